"""Attention of a target over trees without a copy of the keys for every query head that shares them.

With a mask and more than one query transformers repeats keys and values for all heads of a group, the whole text's in each
layer. Here the heads of a group ask together. It is done for the two functions whose arithmetic is known: transformers' own
`sdpa_attention_forward`, and eager attention where it is word for word Llama's. All others are called as they are.

B rows, h heads of queries, g of keys and values, Q queries, K keys, d `head_dim`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import eager_attention_forward

from ..runtime.few_queries import attend_by_products, products_pay
from .lookups import ScopedWrap

# Masks repeated for the heads of a group, by id of the mask and their number: while one forward runs.
_repeated: ContextVar[dict[tuple[int, int], tuple[Tensor, Tensor]] | None] = ContextVar(
    "dream_hf_repeated", default=None
)


@contextmanager
def grouping() -> Iterator[None]:
    """Let forwards of this thread in the block attend in groups, where [`groups_available`]."""
    token = _repeated.set({})
    try:
        yield
    finally:
        _repeated.reset(token)


def groups_available() -> Any:
    """A context in which [`grouping`] works."""
    return _wrap.installed()


def attend_in_groups(attend: Callable) -> Callable | None:
    """The function that computes what `attend` does without repeating keys, if that is known."""
    if attend is sdpa_attention_forward:
        return _sdpa
    return _eager if _is_written_as(attend, eager_attention_forward) else None


def _sdpa(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """`sdpa_attention_forward`, whose arguments and results are these."""
    num_sharing, is_plain = query.shape[1] // key.shape[1], kwargs.get("position_bias") is None and not dropout
    if is_plain and _is_for_all_heads(query, attention_mask) and products_pay(query, key):
        attended = attend_by_products(query, key, value, attention_mask, scaling)
        return attended.transpose(1, 2).contiguous(), None
    if not _is_simple(query, attention_mask, num_sharing) or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if _knows_groups(query.device):
        attended = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
        )
        return attended.transpose(1, 2).contiguous(), None
    mask = _repeat(attention_mask, num_sharing)
    attended = functional.scaled_dot_product_attention(
        folded(query, num_sharing), key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return unfolded(attended, num_sharing).transpose(1, 2).contiguous(), None


def _eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Llama's `eager_attention_forward`, whose arguments and results are these."""
    num_sharing = query.shape[1] // key.shape[1]
    if not _is_simple(query, attention_mask, num_sharing):
        return eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    scores = torch.matmul(folded(query, num_sharing), key.transpose(2, 3)) * scaling
    scores = scores + _repeat(attention_mask, num_sharing)
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    attended = unfolded(torch.matmul(weights, value), num_sharing)
    return attended.transpose(1, 2).contiguous(), unfolded(weights, num_sharing)


def _is_simple(query: Tensor, mask: Any, num_sharing: int) -> bool:
    """Whether keys would be repeated, under a mask that is the same for all heads."""
    return num_sharing > 1 and _is_for_all_heads(query, mask)


def _is_for_all_heads(query: Tensor, mask: Any) -> bool:
    """Whether more than one query is under a mask that is the same for all heads."""
    return query.shape[2] > 1 and isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == 1


def _knows_groups(device: torch.device) -> bool:
    """Whether PyTorch's attention on a device has a kernel that takes both a mask and shared keys."""
    return device.type == "cpu"


def folded(states: Tensor, num_sharing: int) -> Tensor:
    """(B, h, Q, d) -> (B, g, h / g * Q, d).

    The function, not the tensor's method: under a default device the compiler does not see through that.
    """
    return torch.unflatten(states, 1, (-1, num_sharing)).flatten(2, 3)


def unfolded(states: Tensor, num_sharing: int) -> Tensor:
    """(B, g, h / g * Q, n) -> (B, h, Q, n)."""
    return torch.unflatten(states, 2, (num_sharing, -1)).flatten(1, 2)


def _repeat(mask: Tensor, num_sharing: int) -> Tensor:
    """A mask (B, 1, Q, K) for the queries of a group, (B, 1, h / g * Q, K): the same one in all layers of a forward."""
    known = None if torch.compiler.is_compiling() else _repeated.get()
    if known is None:
        return mask.repeat(1, 1, num_sharing, 1)
    key = (id(mask), num_sharing)
    if key not in known:
        known[key] = mask, mask.repeat(1, 1, num_sharing, 1)
    return known[key][1]


def _is_written_as(function: Any, other: Any) -> bool:
    """Whether two functions have the same code, apart from where it stands."""
    codes = [getattr(each, "__code__", None) for each in (function, other)]
    if None in codes:
        return False
    names = ("co_code", "co_names", "co_consts", "co_varnames", "co_argcount", "co_kwonlyargcount")
    return all(getattr(codes[0], name) == getattr(codes[1], name) for name in names)


def _wrap_interface(look_up: Callable) -> Callable:
    @wraps(look_up)
    def get_interface(self: Any, attn_implementation: str, default: Callable) -> Callable:
        attend = look_up(self, attn_implementation, default)
        is_on = torch.compiler.is_compiling() or _repeated.get() is not None
        return (attend_in_groups(attend) or attend) if is_on else attend

    return get_interface


_wrap = ScopedWrap(AttentionInterface, "get_interface", _wrap_interface)
