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
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..visibility import FromStart, Visibilities, Visibility

Angles = tuple[Tensor, Tensor]  # cosines, and sines with a negative first half: (B, 1, T, head_dim) each


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
    hidden = hidden + block.self_attn(block.input_layernorm(hidden), seen.tokens, angles, cache)
    return hidden + block.mlp(block.post_attention_layernorm(hidden))


def cross_attention_block(
    block: Any, hidden: Tensor, features: Tensor, seen: Visibilities, angles: Angles, cache: Cache | None = None
) -> Tensor:
    """Attention to features and an MLP, each behind a gate, (B, T, H)."""
    attention_gate, mlp_gate = block.gates
    attended = block.cross_attn(block.input_layernorm(hidden), features, seen.features, cache)
    hidden = torch.addcmul(hidden, attention_gate, attended)
    return torch.addcmul(hidden, mlp_gate, block.mlp(block.post_attention_layernorm(hidden)))


def self_attention(
    attention: Any, hidden: Tensor, seen: Visibility, angles: Angles, cache: Cache | None = None
) -> Tensor:
    """Llama's attention, told who sees what."""
    queries = _rotate(_heads(attention.q_proj(hidden), attention), angles)
    keys = _rotate(_heads(attention.k_proj(hidden), attention), angles)
    values = _heads(attention.v_proj(hidden), attention)
    keys, values = _remember(keys, values, seen, cache, attention.layer_idx)
    return attention.o_proj(attend(attention, queries, keys, values, seen).flatten(2))


def cross_attention(
    attention: Any, hidden: Tensor, features: Tensor, seen: Visibility, cache: Cache | None = None
) -> Tensor:
    """Attention of tokens to features: per-head RMS norm on queries and keys, no rotary embedding (paper, section 3.1)."""
    queries = attention.q_norm(_heads(attention.q_proj(hidden), attention))
    keys = attention.k_norm(_heads(attention.k_proj(features), attention))
    values = _heads(attention.v_proj(features), attention)
    keys, values = _remember(keys, values, seen, cache, attention.layer_idx)
    unseen = _unseen(values, attention) if seen.may_show_nothing else None
    return attention.o_proj(attend(attention, queries, keys, values, seen, unseen).flatten(2))


def attend(
    attention: Any,
    queries: Tensor,  # (B, heads, T, head_dim)
    keys: Tensor,  # (B, key_value_heads, K, head_dim)
    values: Tensor,  # (B, key_value_heads, K, head_dim)
    seen: Visibility,
    unseen: Tensor | None = None,
) -> Tensor:
    """Attention of the drafter, (B, T, heads, head_dim); queries that see nothing get `unseen`.

    PyTorch's own takes as little memory as the visibility allows, all others take masks.
    """
    dropout = attention.attention_dropout if attention.training else 0.0
    implementation = attention.implementation
    if implementation == "sdpa":
        return seen.attend(queries, keys, values, unseen, attention.scaling, dropout).transpose(1, 2)
    mask = seen.mask(queries.shape[2], keys.shape[2], queries.device).unsqueeze(1)
    # A query that sees nothing (the first token) has no softmax: let it see all, and replace what it gets.
    sees_something = mask.any(-1, keepdim=True)
    bias = attention_bias(mask | ~sees_something, queries.dtype, implementation)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
    attended, _ = function(attention, queries, keys, values, bias, dropout=dropout, scaling=attention.scaling)
    return (
        attended if unseen is None else torch.where(sees_something.transpose(1, 2), attended, unseen.transpose(1, 2))
    )


def attention_bias(mask: Tensor, dtype: torch.dtype, attn_implementation: str | None) -> Tensor:
    """A boolean mask in the form an attention function takes: eager adds it to the scores, the others read booleans."""
    if attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def rotary_angles(rotary: Any, like: Tensor, positions: Tensor) -> Angles:
    """Rotary angles at `positions` (B, T), in the dtype of `like`."""
    cos, sin = rotary(like, positions)
    first, second = sin.chunk(2, dim=-1)
    return cos.unsqueeze(1), torch.cat([-first, second], dim=-1).unsqueeze(1)


def _rotate(states: Tensor, angles: Angles) -> Tensor:
    """Rotary embedding of (B, heads, T, head_dim): dimension i pairs with i + head_dim / 2."""
    cos, sin = angles
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), sin)


def _heads(projected: Tensor, attention: Any) -> Tensor:
    """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
    return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _remember(
    keys: Tensor, values: Tensor, seen: Visibility, cache: Cache | None, layer_idx: int
) -> tuple[Tensor, Tensor]:
    """Put keys and values into the cache; returns all that a query may see."""
    if cache is None:
        return keys, values
    shown = cache.update(keys, values, layer_idx)
    return (keys, values) if isinstance(seen, FromStart) else shown  # buffers may have room behind a first text


def _unseen(values: Tensor, attention: Any) -> Tensor:
    """For a query without a visible feature: zeros, or the published code's uniform average.

    (B, heads, 1, head_dim), or what expands to it.
    """
    if not attention.config.legacy or not values.shape[2]:
        return values.new_zeros(1, 1, 1, 1)
    return values.mean(2, keepdim=True).repeat_interleave(attention.num_key_value_groups, dim=1)
