"""Bringing the entries that matter to the left end of every row."""

from __future__ import annotations

import torch


def left_aligned(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices that bring each row's kept tokens to its left end, in order.

    Args:
        keep (`torch.BoolTensor` of shape `(B, T)`): Tokens to keep.

    Returns:
        `tuple`: Indices (B, T) of which the first `counts[b]` matter, and counts (B,).
    """
    return (~keep).int().argsort(dim=-1, stable=True), keep.sum(-1)
