"""Attention of drafters, as functions: heads, rotary embedding, the cache, and who sees what.

B rows, T new tokens, K keys, those in the cache included. `attention` is a module, or what has its attributes: `head_dim`,
`scaling`, `attention_dropout`, `training`, `implementation`, `num_key_value_groups`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from .visibility import FromStart, Visibility

SEEN = "dream_hf_seen"  # the attention of transformers' own layers that are given a `Visibility` for a mask
Angles = tuple[Tensor, Tensor]  # cosines, and sines with a negative first half: (B, 1, T, head_dim) each


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


def attend_seen(
    module: Any,
    query: Tensor,  # (B, heads, T, head_dim)
    key: Tensor,  # (B, key_value_heads, K, head_dim)
    value: Tensor,  # (B, key_value_heads, K, head_dim)
    attention_mask: Visibility,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention (B, T, heads, head_dim) as transformers' layers look it up, by the name of `SEEN`."""
    scale = module.head_dim**-0.5 if scaling is None else scaling
    return attention_mask.attend(query, key, value, None, scale, dropout).transpose(1, 2), None


AttentionInterface.register(SEEN, attend_seen)


def attention_bias(mask: Tensor, dtype: torch.dtype, attn_implementation: str | None) -> Tensor:
    """A boolean mask in the form an attention function takes: eager adds it to the scores, the others read booleans."""
    if attn_implementation != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def rotated(states: Tensor, angles: Angles) -> Tensor:
    """Rotary embedding of (B, heads, T, head_dim): dimension i pairs with i + head_dim / 2."""
    cos, sin = angles
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), sin)


def split_heads(projected: Tensor, attention: Any) -> Tensor:
    """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
    return torch.unflatten(projected, -1, (-1, attention.head_dim)).transpose(1, 2)


def turned_heads(attention: Any, hidden: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, heads, T, head_dim), keys and values (B, key_value_heads, T, head_dim), all but the values turned."""
    if getattr(attention, "qkv_proj", None) is None:
        queries, keys, values = (
            split_heads(project(hidden), attention)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return rotated(queries, angles), rotated(keys, angles), values
    states = split_heads(attention.qkv_proj(hidden), attention)
    num_keys = states.shape[1] // (attention.num_key_value_groups + 2)
    turned = rotated(states[:, :-num_keys], angles)
    return turned[:, :-num_keys], turned[:, -num_keys:], states[:, -num_keys:]


def keys_and_values(attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values, (B, key_value_heads, T, head_dim) each, as they are projected."""
    if getattr(attention, "kv_proj", None) is None:
        return split_heads(attention.k_proj(hidden), attention), split_heads(attention.v_proj(hidden), attention)
    keys, values = split_heads(attention.kv_proj(hidden), attention).chunk(2, dim=1)
    return keys, values


def added(residual: Tensor | None, function: Any, hidden: Tensor) -> Tensor:
    """`residual`, if there is one, and what a function makes of (B, T, H), in one operation where the function knows how."""
    if residual is None:
        return function(hidden)
    return function.onto(residual, hidden) if hasattr(function, "onto") else residual + function(hidden)


def remembered(
    keys: Tensor, values: Tensor, seen: Visibility, cache: Cache | None, layer_idx: int
) -> tuple[Tensor, Tensor]:
    """Put keys and values into the cache; returns all that a query may see."""
    if cache is None:
        return keys, values
    shown = cache.update(keys, values, layer_idx)
    return (keys, values) if isinstance(seen, FromStart) else shown  # buffers may have room behind a first text
