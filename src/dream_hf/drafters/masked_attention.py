"""Attention under masks that are made for some queries at a time, and attention to keys that are a query's own.

B rows, h heads of queries, g of keys and values, T queries, K keys, d `head_dim`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from ..targets.grouped_attention import folded, unfolded

MASK_ENTRIES = 2**23  # of the masks that are in memory at a time
BIAS_COLUMNS = 16  # rows of what is added to scores start at multiples of it, which kernels of accelerators want
SINK_COLUMNS = 8  # two are used; kernels want a multiple of 8


def attend_masked(
    queries: Tensor,  # (B, h, T, d)
    keys: Tensor,  # (B, g, K, d)
    values: Tensor,  # (B, g, K, d)
    mask: Tensor,  # (B or 1, T, K)
    unseen: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention to the keys that a mask shows; heads that share keys ask together, so that no key is copied."""
    sees_something = None if unseen is None else mask.any(-1, keepdim=True)
    if sees_something is not None:  # no softmax otherwise
        mask = mask | ~sees_something
    num_sharing = queries.shape[1] // keys.shape[1]
    attended = scaled_dot_product_attention(
        folded(queries, num_sharing),
        keys,
        values,
        attn_mask=mask.repeat(1, num_sharing, 1).unsqueeze(1),
        scale=scale,
        dropout_p=dropout,
    )
    attended = unfolded(attended, num_sharing)
    if sees_something is None or unseen is None:
        return attended
    return torch.where(sees_something.unsqueeze(1), attended, unseen.to(attended.dtype))


def aligned_bias(bias: Tensor) -> Tensor:
    """What is added to scores, (..., K), where kernels can read it: off the CPU, rows start at aligned addresses.

    PyTorch copies a bias whose rows do not, once for each attention; that a view starts in the middle it does not see, and its
    memory-efficient kernel fails with "misaligned address".
    """
    if not needs_alignment(bias.device):
        return bias
    num_columns = bias.shape[-1]
    return pad(bias, (0, BIAS_COLUMNS - num_columns % BIAS_COLUMNS))[..., :num_columns]  # never by none: a new buffer


def needs_alignment(device: torch.device) -> bool:
    """Whether attention on a device runs in kernels that read several numbers at a time."""
    return device.type != "cpu"


def mask_rows(queries: Tensor, num_keys: int) -> int:
    """How many of the queries (B, h, T, d) may have a mask at a time."""
    return max(1, MASK_ENTRIES // max(queries.shape[0] * queries.shape[1] * num_keys, 1))


def in_chunks(attend_some: Callable[[slice], Tensor], num_queries: int, size: int) -> Tensor:
    """Attention (B, h, T, d) in chunks of queries; the backward pass makes the masks of several chunks anew."""
    if num_queries <= size:
        return attend_some(slice(0, num_queries))
    parts = [slice(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    return torch.cat([checkpoint(attend_some, part, use_reentrant=False) for part in parts], dim=2)


def attend_own(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of M queries to what is their own of keys and values (B, g, depth * M, d).

    Returns the log-sum-exp of the scores, (B, h, M, 1), and what came of it, (B, h, M, d), in float32 or better.
    """
    num_queries, num_groups = queries.shape[2], keys.shape[1]
    dtype = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        grouped = torch.unflatten(queries.to(dtype), 1, (num_groups, -1)).transpose(2, 3)  # (B, g, M, h / g, d)
        keys, values = (
            torch.unflatten(states.to(dtype), 2, (-1, num_queries)).transpose(2, 3)  # (B, g, M, depth, d)
            for states in (keys, values)
        )
        scores = scale * grouped @ keys.mT
        sums = scores.logsumexp(-1, keepdim=True)
        attended = (scores - sums).exp() @ values
    return sums.transpose(2, 3).flatten(1, 2), attended.transpose(2, 3).flatten(1, 2)


def in_two_parts(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores (..., 1) as sums of two columns, between which half precision loses little: (..., SINK_COLUMNS)."""
    high = scores.to(dtype)
    low = (scores - high).to(dtype)
    return pad(torch.cat([high, low], dim=-1), (0, SINK_COLUMNS - 2))


def with_sink(states: Tensor, num_ones: int) -> Tensor:
    """Keys or values (B, g, K, d) behind one that has ones in the first new columns: (B, g, 1 + K, d + SINK_COLUMNS)."""
    sink = pad(states.new_ones(num_ones), (states.shape[3], SINK_COLUMNS - num_ones))
    return torch.cat([sink.expand(*states.shape[:2], 1, -1), pad(states, (0, SINK_COLUMNS))], dim=2)


def dtype_of_attention(queries: Tensor) -> torch.dtype:
    """What attention computes in, autocast considered."""
    device = queries.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
