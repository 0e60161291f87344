"""Attention of few queries to many keys, in graphs for accelerators.

A fused kernel takes a head's queries, up to a hundred or so of them, through all of the keys in one block. A tree's few nodes
in one row make fewer blocks than an accelerator has processors, most of which then wait. Products of matrices are cut along
the keys, too: on an H200 they take 20 microseconds where cuDNN's kernel takes 49 (33 queries in 32 heads, 2,048 keys), and 14
where it takes 47 (5 queries). Only compiled code is served: what lies between the products is one kernel there.

B rows, h heads of queries, g of keys and values, Q queries, K keys, d `head_dim`.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOST_BLOCKS = 64  # half the processors of an H100 or H200
BLOCK = 128  # queries that a block takes
ALIGNED = 8  # keys: where rows of weights do not start at multiples of 16 bytes, products take several times as long


def products_pay(query: Tensor, key: Tensor) -> bool:
    """Whether [`attend_by_products`] is the faster one, for `query` (B, h, Q, d) and `key` (B, g, K, d)."""
    batch, num_groups = key.shape[:2]
    num_queries = query.shape[1] // num_groups * query.shape[2]
    return _is_for_accelerator(query) and batch * num_groups * -(-num_queries // BLOCK) <= MOST_BLOCKS


def aligned_count(num_keys: int) -> int:
    """The number of keys, at least `num_keys`, that products are fast with."""
    return -(-num_keys // ALIGNED) * ALIGNED


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention of `query` (B, h, Q, d) to keys and values (B, g, K, d), each of which h / g heads share: (B, h, Q, d).

    `mask` (B, 1, Q, K) is True, or 0, where a key is seen; else False, or what is added to scores.
    """
    num_groups, num_sharing = key.shape[1], query.shape[1] // key.shape[1]
    asked = torch.unflatten(query, 1, (num_groups, num_sharing)).flatten(2, 3)
    scores = torch.unflatten(asked @ key.mT, 2, (num_sharing, -1))  # (B, g, h / g, Q, K)
    scores = scores.float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = mask.unsqueeze(2)
    scores = torch.where(seen, scores, -torch.inf) if mask.dtype == torch.bool else scores + seen
    weights = scores.softmax(-1).to(query.dtype).flatten(2, 3)
    return torch.unflatten(weights @ value, 2, (num_sharing, -1)).flatten(1, 2)


def _is_for_accelerator(query: Tensor) -> bool:
    return torch.compiler.is_compiling() and query.device.type == "cuda"
