"""Character spans of a rendered conversation -> tokens, after the processor has written out each image placeholder."""

from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from .chat import Span


def expand_spans(spans: list[Span], replacements: list[dict[str, Any]]) -> list[Span]:
    """
    Move `spans` past the placeholders written out before them.

    Args:
        spans: In the characters of the text that the processor was given. replacements: The processor's record for
        this text, `text_replacement_offsets`: per placeholder `span` (where it
            stood) and `new_span` (where what replaced it stands), in order.
    """
    ends = [replacement["span"][1] for replacement in replacements]
    gains = [0] + [replacement["new_span"][1] - replacement["span"][1] for replacement in replacements]
    return [(start + gains[bisect_right(ends, start)], end + gains[bisect_right(ends, end)]) for start, end in spans]


def tokens_in_spans(offsets: Tensor, spans: list[Span]) -> Tensor:
    """Tokens that share a character with one of `spans`: (T, 2) offsets -> (T,) bool. Padding has empty offsets."""
    mask = torch.zeros(len(offsets), dtype=torch.bool, device=offsets.device)
    for start, end in spans:
        mask |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
    return mask


def check_text_kept(text: str, replacements: list[dict[str, Any]], offsets: Tensor) -> None:
    """
    Refuse a processor that rewrites the text in ways it does not report: every answer would be off by some characters.

    Raises:
        ValueError: The tokens end elsewhere than the text and its reported replacements do.
    """
    gain = replacements[-1]["new_span"][1] - replacements[-1]["span"][1] if replacements else 0
    end = int(offsets.max()) - gain
    if end > len(text) or text[end:].strip():
        raise ValueError(
            f"the processor tokenised {end} characters of a conversation of {len(text)}, so it changes the text and "
            "the answers cannot be located in its tokens"
        )
