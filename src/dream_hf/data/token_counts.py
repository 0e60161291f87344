"""How often each token occurs in the answers of a dataset."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .alignment import tokens_in_spans
from .conversations import parse_text
from .dataset import ConversationDataset
from .encoding import ConversationEncoder


def count_answer_tokens(
    rows: Any,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    vocab_size: int,
    indices: Iterable[int] | None = None,
) -> Tensor:
    """Count the tokens of the answers, written and tokenised as in training; no picture is looked at.

    Args:
        rows: Rows of `messages`, a file or a Hub id, as `DreamTrainer` takes them, or a `ConversationDataset`. Rows that
            cannot be read or written are left out; training reports them.
        processing_class (`ProcessorMixin` or `PreTrainedTokenizerBase`): The target's own, with its chat template.
        vocab_size (`int`): Of the target: `drafter.config.vocab_size`.
        indices (`Iterable[int]`, *optional*): Which rows; by default all.

    Returns:
        `torch.LongTensor` of shape `(vocab_size,)`: What `choose_draft_vocabulary` takes.

    Raises:
        ValueError: No rows, a processor that does not fit, or tokens that the vocabulary does not have.
    """
    dataset = rows if isinstance(rows, ConversationDataset) else ConversationDataset(rows, name="rows")
    encoder = ConversationEncoder(processing_class)
    counts = torch.zeros(vocab_size, dtype=torch.long, device="cpu")
    for index in range(len(dataset)) if indices is None else indices:
        # Whatever is wrong with a row, or with what a template makes of it, is a reason to go without it.
        try:
            row = encoder.render(parse_text(dataset.source.rows[index]))
        except Exception:
            continue
        found = _answer_ids(encoder.tokenizer, row.text, row.answer_spans)
        counted = torch.bincount(found, minlength=vocab_size)
        if len(counted) > vocab_size:
            raise ValueError(
                f"`processing_class` makes token {int(found.max())} of row {index}, and `vocab_size` is {vocab_size}. Pass the "
                "processor that belongs to the target."
            )
        counts += counted
    return counts


def _answer_ids(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[tuple[int, int]]) -> Tensor:
    """The tokens of a conversation's answers, (n,)."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = torch.as_tensor(encoded["offset_mapping"], device="cpu").view(-1, 2)
    token_ids = torch.as_tensor(encoded["input_ids"], dtype=torch.long, device="cpu")
    return token_ids[tokens_in_spans(offsets, spans)]
