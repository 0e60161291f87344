"""The drafter's arithmetic, as functions over its parts.

Parts are a module of `modeling`, or what stands in for one in decoding (see `functional`): something that has its submodules,
or functions that compute the same, by their names. Shapes: B rows, T new tokens, S new features, H `hidden_size`; K and F are
the tokens and the features that the self-attention and the cross-attention can see, those in the cache included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..attention import Angles, added, attend, keys_and_values, remembered, split_heads, turned_heads
from ..visibility import Visibilities, Visibility


def run_blocks(
    model: Any,
    hidden: Tensor,  # (B, T, H), embeddings behind the input norm
    features: Tensor,  # (B, S, H)
    seen: Visibilities,
    angles: Angles,
    cache: Cache | None,
) -> tuple[Tensor, Tensor]:
    """What the drafter makes of T new tokens, and what enters its last block: (B, T, H) each."""
    mid = hidden
    features = model.feature_norm(features)
    for block in model.layers:
        mid = hidden
        hidden = block(hidden, features, seen, angles, cache)
    return model.norm(hidden), mid


def self_attention_block(
    block: Any, hidden: Tensor, features: Tensor, seen: Visibilities, angles: Angles, cache: Cache | None = None
) -> Tensor:
    """Causal self-attention and an MLP, (B, T, H)."""
    hidden = block.self_attn(block.input_layernorm(hidden), seen.tokens, angles, cache, hidden)
    return added(hidden, block.mlp, block.post_attention_layernorm(hidden))


def cross_attention_block(
    block: Any, hidden: Tensor, features: Tensor, seen: Visibilities, angles: Angles, cache: Cache | None = None
) -> Tensor:
    """Attention to features and an MLP, each behind a gate, (B, T, H)."""
    attention_gate, mlp_gate = block.gates
    attended = block.cross_attn(block.input_layernorm(hidden), features, seen.features, cache)
    hidden = torch.addcmul(hidden, attention_gate, attended)
    return torch.addcmul(hidden, mlp_gate, block.mlp(block.post_attention_layernorm(hidden)))


def self_attention(
    attention: Any,
    hidden: Tensor,
    seen: Visibility,
    angles: Angles,
    cache: Cache | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Llama's attention, told who sees what; added to `residual`, (B, T, H), if that is given."""
    queries, keys, values = turned_heads(attention, hidden, angles)
    keys, values = remembered(keys, values, seen, cache, attention.layer_idx)
    return added(residual, attention.o_proj, attend(attention, queries, keys, values, seen).flatten(2))


def cross_attention(
    attention: Any, hidden: Tensor, features: Tensor, seen: Visibility, cache: Cache | None = None
) -> Tensor:
    """Attention of tokens to features: per-head RMS norm on queries and keys, no rotary embedding (paper, section 3.1)."""
    queries = attention.q_norm(split_heads(attention.q_proj(hidden), attention))
    keys, values = keys_and_values(attention, features)
    keys, values = remembered(attention.k_norm(keys), values, seen, cache, attention.layer_idx)
    unseen = _unseen(values, attention) if seen.may_show_nothing else None
    return attention.o_proj(attend(attention, queries, keys, values, seen, unseen).flatten(2))


def rotary_angles(rotary: Any, like: Tensor, positions: Tensor) -> Angles:
    """Rotary angles at `positions` (B, T), in the dtype of `like`."""
    cos, sin = rotary(like, positions)
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(1), torch.cat([-first, second], dim=-1).unsqueeze(1)


def _unseen(values: Tensor, attention: Any) -> Tensor:
    """For a query without a visible feature: zeros, or the published code's uniform average.

    (B, heads, 1, head_dim), or what expands to it.
    """
    if not attention.config.legacy or not values.shape[2]:
        return values.new_zeros(1, 1, 1, 1)
    return values.mean(2, keepdim=True).repeat_interleave(attention.num_key_value_groups, dim=1)
