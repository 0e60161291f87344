"""Prompts that nobody had to collect: a chat model writes the user's turn itself (Magpie, arXiv 2406.08464).

What a chat template writes before a user's words is given to the model as the beginning of a text, and it goes on with what
a user might say. Left to itself a model opens most of them with the same few words; therefore the first token is drawn evenly
among the likeliest ones, and only the rest is sampled.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.reader import ChatReader
from ..targets.target import end_ids
from .journal import append, begin_folder, cut_unfinished_line, entries

logger = logging.get_logger(__name__)

NUM_OPENINGS = 256  # first tokens that a prompt may begin with
MAX_PROMPT_TOKENS = 128
TOP_K = 100  # of the tokens behind the first; nuclei (top_p) would sort the vocabulary for each
LEAST_WORDS, LEAST_CHARACTERS = 3, 12
PATIENCE = 8  # batches in a row without a new prompt, after which there are none
MARK = "\N{SNOWMAN}"  # stands where the user's words go


@dataclass(frozen=True)
class UserTurn:
    """What a chat template writes around a user's words.

    Args:
        opening (`str`): Everything before them, a default system prompt included.
        closing (`str`): What comes right after them; empty where a template closes turns with white space alone.
    """

    opening: str
    closing: str

    @classmethod
    def of(cls, reader: ChatReader) -> UserTurn:
        """The turn of a processor's template."""
        text = reader.text([{"role": "user", "content": [{"type": "text", "text": MARK}]}], add_generation_prompt=True)
        opening, _, closing = text.partition(MARK)
        return cls(opening, closing.strip().split("\n")[0].strip())


def write_prompts(
    target: Any, processor: Any, folder: str | Path, num_prompts: int, batch_size: int = 64, seed: int = 42
) -> list[dict[str, Any]]:
    """Let `target` write prompts; started again, it goes on, and more can be asked for later.

    Args:
        target (`PreTrainedModel`): A chat model.
        processor (`ProcessorMixin` or `PreTrainedTokenizerBase`): Its processor, with a chat template.
        folder (`str` or `Path`): Where drafts of prompts are kept, `batches.jsonl`.
        num_prompts (`int`): How many different ones are wanted.
        batch_size (`int`): Written together.
        seed (`int`): For sampling; the same seed, batch size and machine give the same prompts.

    Returns:
        `list[dict]`: Rows of one user message, `num_prompts` of them or as many as the model finds.

    Raises:
        ValueError: A number below 1, a folder begun with other settings, or a model that writes nothing usable.
    """
    for name, value in (("num_prompts", num_prompts), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` ({value}) must be at least 1.")
    folder = Path(folder).expanduser()
    name = getattr(target.config, "_name_or_path", "") or type(target).__name__
    begin_folder(folder, {"target": name, "dtype": str(target.dtype), "batch_size": batch_size, "seed": seed})
    file = folder / "batches.jsonl"
    cut_unfinished_line(file)
    prompts: dict[str, str] = {}  # by what makes two of them the same
    num_batches = num_vain = 0
    for _, entry in entries(file):
        num_vain = 0 if _keep(entry["prompts"], prompts) else num_vain + 1
        num_batches += 1
    if len(prompts) < num_prompts:
        writer = _Writer(target, ChatReader(processor))
        with tqdm(desc="prompts", unit="prompt", total=num_prompts, initial=len(prompts)) as progress:
            while len(prompts) < num_prompts and num_vain < PATIENCE:
                written = list(writer.write(batch_size, seed + num_batches))
                append(file, {"prompts": written})
                num_new = _keep(written, prompts)
                progress.update(num_new)
                num_batches, num_vain = num_batches + 1, 0 if num_new else num_vain + 1
    return _rows(prompts.values(), num_prompts)


def _rows(prompts: Iterable[str], num_prompts: int) -> list[dict[str, Any]]:
    kept = list(prompts)[:num_prompts]
    if not kept:
        raise ValueError(
            f"`num_prompts` ({num_prompts}): the target wrote no usable prompt. Is it a chat model? Give it rows instead."
        )
    if len(kept) < num_prompts:
        logger.warning(f"The target finds no more than {len(kept)} different prompts; {num_prompts} were asked for.")
    return [{"messages": [{"role": "user", "content": prompt}]} for prompt in kept]


def _keep(written: Sequence[str], prompts: dict[str, str]) -> int:
    """Add what is usable and new to `prompts`; returns how many that were."""
    before = len(prompts)
    for prompt in written:
        if is_usable(prompt):
            prompts.setdefault(same(prompt), prompt)
    return len(prompts) - before


def is_usable(prompt: str) -> bool:
    """A few words, all of them characters that can be shown."""
    is_long = len(prompt) >= LEAST_CHARACTERS and len(same(prompt).split()) >= LEAST_WORDS
    return is_long and "\N{REPLACEMENT CHARACTER}" not in prompt


def same(prompt: str) -> str:
    """What two prompts that differ in nothing but case, space and punctuation have in common."""
    return " ".join(re.findall(r"\w+", prompt.casefold()))


class _Writer:
    """Samples users' turns from a target."""

    def __init__(self, target: Any, reader: ChatReader) -> None:
        self.target, self.tokenizer = target, reader.tokenizer
        self.turn = UserTurn.of(reader)
        special = self.tokenizer.bos_token is None or not self.turn.opening.startswith(self.tokenizer.bos_token)
        ids = self.tokenizer(self.turn.opening, add_special_tokens=special)["input_ids"]
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and special and ids[-1] == eos and not self.turn.opening.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]  # some tokenizers close every text
        self.opening = torch.tensor([ids], device=target.device)
        added = self.tokenizer.added_tokens_decoder.items()
        self.special = set(self.tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}
        self.ends = self._ends()
        self.first_tokens = self._first_tokens()

    def _ends(self) -> list[int]:
        """Tokens that end a user's turn: the model's own, and the template's where it is a single special one."""
        closing = self.tokenizer(self.turn.closing, add_special_tokens=False)["input_ids"][:1]
        own = end_ids(self.target.generation_config) | end_ids(self.tokenizer)
        return sorted(own | self.special.intersection(closing))

    @torch.no_grad()
    def _first_tokens(self) -> torch.Tensor:
        """The likeliest tokens that a user's words can begin with."""
        likeliest = self.target(input_ids=self.opening, logits_to_keep=1).logits[0, -1].argsort(descending=True)
        begins = [each for each in likeliest[: 8 * NUM_OPENINGS].tolist() if self._is_beginning(each)]
        return torch.tensor(begins[:NUM_OPENINGS], device=self.target.device)

    def _is_beginning(self, token_id: int) -> bool:
        text: Any = self.tokenizer.decode([token_id])
        return token_id not in self.special and text[:1].isalnum()

    def write(self, batch_size: int, seed: int) -> Iterator[str]:
        """One batch; turns that did not come to an end, or have a special token in them, are left out."""
        torch.manual_seed(seed)
        firsts = self.first_tokens[torch.randint(len(self.first_tokens), (batch_size, 1)).to(self.opening.device)]
        ids = torch.cat([self.opening.expand(batch_size, -1), firsts], dim=1)
        output = self.target.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=1.0,
            top_k=TOP_K,
            eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id,
            max_new_tokens=MAX_PROMPT_TOKENS,
        )
        for tokens in output[:, self.opening.shape[1] :].tolist():
            end = next((place for place, token in enumerate(tokens) if token in self.ends), None)
            text: Any = self.tokenizer.decode(tokens[:end])
            words, closing, _ = text.partition(self.turn.closing) if self.turn.closing else (text, "", "")
            if (end is not None or closing) and self.special.isdisjoint(tokens[:end]):
                yield words.strip()
