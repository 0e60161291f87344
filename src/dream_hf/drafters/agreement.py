"""How often drafters say what the target says, along texts that the target has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..decoding.drafter import Drafter, Prefill, Verified
from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from .combined import CombinedDrafter, CombinedSession
from .inspection import log_probs_along

LEAST_LOG_PROB = -20.0  # of a token that a drafter cannot draft, for means


@dataclass(frozen=True)
class Text:
    """A prompt of one row, as for `generate()`, and what the target writes after it.

    Args:
        inputs (`Mapping`): The prompt.
        tokens (`tuple[int, ...]`): What follows it, greedily.
    """

    inputs: Mapping[str, Any]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """How well a drafter foretold texts, by levels: the first is of the token after the last one, on the target's features,
    the others are drafted on its own, along the text.

    Args:
        num_tokens (`tuple[int, ...]`): Tokens that were foretold, of each level.
        shares (`tuple[float, ...]`): The share of them where the drafter's likeliest token was the target's.
        log_prob (`float`): What the drafter gave the target's tokens, in the mean of all levels; -20 where it cannot draft one.
    """

    num_tokens: tuple[int, ...]
    shares: tuple[float, ...]
    log_prob: float

    @property
    def gain(self) -> float:
        """Tokens that a chain of as many levels would gain in a step, the target's own included."""
        total, reached = 1.0, 1.0
        for share in self.shares:
            reached *= share
            total += reached
        return total


def write_texts(
    target: Any, inputs: Sequence[Mapping[str, Any]] | None, num_tokens: int, length: int = 64, seed: int = 0
) -> list[Text]:
    """Texts that the target writes greedily, of about `num_tokens` tokens together.

    Args:
        target (`PreTrainedModel`): The target.
        inputs (`Sequence[Mapping]`, *optional*): Prompts of one row, as for `generate()`; by default the target writes the
            beginnings of texts itself, sampled from nothing.
        num_tokens (`int`): How many tokens to write.
        length (`int`): Most tokens of a text.
        seed (`int`): For beginnings that the target writes.

    Raises:
        ValueError: A prompt of several rows, or one whose text ends at once, every time.
    """
    texts: list[Text] = []
    length = min(length, num_tokens)
    most = len(inputs) if inputs is not None else 4 * -(-num_tokens // length)
    for index in range(most):
        prompt = inputs[index] if inputs is not None else _beginning(target, seed + index)
        rows, width = prompt["input_ids"].shape
        if rows != 1:
            raise ValueError(f"`inputs` has a prompt of {rows} rows; pass one row at a time.")
        written = target.generate(**prompt, **_greedy(length))
        texts.append(Text(prompt, tuple(written[0, width:].tolist())))
        if sum(len(text.tokens) for text in texts) >= num_tokens:
            break
    if not any(len(text.tokens) > 2 for text in texts):
        raise ValueError(
            "The target ends every text at once, so that nothing can be foretold; pass `inputs` of your own."
        )
    return texts


def agreements(
    target: Any, drafters: Sequence[Drafter], texts: Sequence[Text], num_levels: int = 3
) -> list[Agreement]:
    """How well each of the drafters foretells the texts, all of them in one pass over each text.

    Raises:
        TypeError: A drafter that has no log-probabilities.
    """
    tallies = [_Tally(num_levels) for _ in drafters]
    for text in texts:
        asking = _Asking(drafters, text.tokens, tallies)
        target.generate(**text.inputs, assistant_model=asking, **_greedy(len(text.tokens)))
    return [tally.agreement() for tally in tallies]


def _greedy(length: int) -> dict[str, Any]:
    return {"max_new_tokens": length, "do_sample": False, "num_beams": 1, "return_dict_in_generate": False}


def _beginning(target: Any, seed: int) -> dict[str, torch.Tensor]:
    """A few tokens that the target writes when it is given nothing."""
    config, text = target.generation_config, target.config.get_text_config(decoder=True)
    starts = [
        config.bos_token_id,
        getattr(text, "bos_token_id", None),
        config.eos_token_id,
        getattr(text, "eos_token_id", None),
    ]
    flat = [start[0] if isinstance(start, (list, tuple)) else start for start in starts]
    first = next((token for token in flat if token is not None), 0)
    ids = torch.tensor([[first]], device=target.device)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = target.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=True,
            return_dict_in_generate=False,
        )  # fmt: skip
    return {"input_ids": written, "attention_mask": torch.ones_like(written)}


class _Tally:
    """What one drafter has foretold so far."""

    def __init__(self, num_levels: int):
        self.asked, self.right = [0] * num_levels, [0] * num_levels
        self.log_prob = 0.0

    def note(self, log_probs: torch.Tensor, tokens: Sequence[int]) -> None:
        """Take in `log_probs` (n, V) of levels, of which the text says `tokens`."""
        for level, (row, token) in enumerate(zip(log_probs, tokens, strict=True)):
            self.asked[level] += 1
            self.right[level] += int(row.argmax()) == token
            self.log_prob += max(float(row[token]), LEAST_LOG_PROB)

    def agreement(self) -> Agreement:
        shares = tuple(right / max(asked, 1) for right, asked in zip(self.right, self.asked, strict=True))
        return Agreement(tuple(self.asked), shares, self.log_prob / max(sum(self.asked), 1))


class _Asking(CombinedDrafter):
    """Drafters that are asked after every token of a text what comes next, and draft nothing."""

    def __init__(self, drafters: Sequence[Drafter], text: tuple[int, ...], tallies: Sequence[_Tally]):
        super().__init__(drafters)
        self.text, self.tallies = text, tallies

    def start(self, prefill: Prefill, settings: DraftSettings) -> CombinedSession:
        return _AskingSession(self, prefill, settings)


class _AskingSession(CombinedSession):
    drafter: _Asking

    def __init__(self, drafter: _Asking, prefill: Prefill, settings: DraftSettings):
        super().__init__(drafter, prefill, settings)
        self.vocab_size = prefill.target.text_config.vocab_size
        self.place = 0  # in the text, of the last token

    def draft(self, root_tokens: torch.Tensor, max_depth: int | None = None) -> DraftTree:
        text, tallies = self.drafter.text, self.drafter.tallies
        coming = text[self.place + 1 :][: len(tallies[0].asked)]
        if coming and text[self.place] == int(root_tokens):  # in 16 bits a text may be written another way
            for session, tally in zip(self.sessions, tallies, strict=True):
                log_probs = log_probs_along(session, list(coming[:-1]), self.vocab_size)
                tally.note(log_probs, coming)
        return DraftTree.chain(root_tokens)

    def read(self, verified: Verified) -> None:
        self.place += verified.counts[0]
        super().read(verified)
