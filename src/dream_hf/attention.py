"""Scoped access to transformers' attention: tree masks, and what a layer's attention looks like.

transformers builds every mask through the functions registered in `AttentionMaskInterface` and runs every attention but
the eager one through those in `AttentionInterface`. Inside the scopes below these are wrapped. A wrapper does nothing
unless a context variable of the calling thread says so, and the registries are put back when the last scope closes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import AttentionInterface

TREE_IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
QUERY_CHUNK, MIN_QUERY_CHUNK = 256, 16


@dataclass(frozen=True)
class TreeScope:
    """A tree being verified: `lengths` (B,) verified slots, `depths` (B, N) and `ancestors` (B, N, N) of its nodes."""

    lengths: torch.Tensor
    depths: torch.Tensor
    ancestors: torch.Tensor

    def to(self, device: torch.device | str) -> TreeScope:
        """The same on another device."""
        return TreeScope(self.lengths.to(device), self.depths.to(device), self.ancestors.to(device))


# Called with a module and, for consecutive chunks of queries, probabilities (B, heads, queries, K).
AttentionObserver = Callable[[nn.Module, Iterator[torch.Tensor]], None]

_tree: ContextVar[TreeScope | None] = ContextVar("dream_hf_tree", default=None)
# By id of an attention module: who watches it, and which of its queries (None for all).
_Watch = tuple[AttentionObserver, torch.Tensor | None]
_observed: ContextVar[dict[int, _Watch] | None] = ContextVar("dream_hf_observed", default=None)


class _RegistryWraps:
    """Wrappers in one of transformers' registries, installed while at least one scope is open."""

    def __init__(self, interface: type, wrap: Callable[[Callable], Callable]):
        self.interface, self.wrap = interface, wrap
        self.lock = threading.Lock()
        self.num_users = 0
        self.replaced: dict[str, tuple[Callable, Callable]] = {}

    @contextmanager
    def installed(self, names: Sequence[str]) -> Iterator[None]:
        mapping = self.interface._global_mapping  # type: ignore[attr-defined]
        with self.lock:
            self.num_users += 1
            for name in names:
                if name in mapping and name not in self.replaced:
                    self.replaced[name] = (mapping[name], self.wrap(mapping[name]))
                    mapping[name] = self.replaced[name][1]
        try:
            yield
        finally:
            with self.lock:
                self.num_users -= 1
                if not self.num_users:
                    for name, (original, wrapper) in self.replaced.items():
                        if mapping.get(name) is wrapper:
                            mapping[name] = original
                    self.replaced = {}


# --- tree masks ---


@contextmanager
def tree_masks_available(text_config: Any) -> Iterator[None]:
    """Let [`tree_scope`] work on models with this text configuration.

    Attention implementations that take no mask (FlashAttention) run as `"sdpa"` while in the block.
    """
    implementation = text_config._attn_implementation
    with _mask_wraps.installed(TREE_IMPLEMENTATIONS):
        if implementation not in TREE_IMPLEMENTATIONS:
            text_config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            text_config._attn_implementation = implementation


@contextmanager
def tree_scope(scope: TreeScope) -> Iterator[None]:
    """Forwards of N new tokens in the block treat them as the nodes of a tree."""
    token = _tree.set(scope)
    try:
        yield
    finally:
        _tree.reset(token)


def current_tree() -> TreeScope | None:
    """The tree this thread is verifying, if it is."""
    return _tree.get()


def tree_mask_function(scope: TreeScope, mask_function: Callable, q_offset: int) -> Callable:
    """The model's own `mask_function` at logical positions, and only on verified slots and ancestors.

    Slot s of row b holds the verified token s if s < `lengths[b]`, else node s - `lengths[b]`. A node's logical position
    is `lengths[b]` plus its depth, so that sliding windows and chunks cut where they would in plain decoding.
    """
    num_nodes = scope.depths.shape[1]

    def inner(batch_idx, head_idx, q_idx, kv_idx):
        length = scope.lengths[batch_idx]
        query, key = q_idx - q_offset, kv_idx - length
        key_node = key.clamp(0, num_nodes - 1)
        is_verified = key < 0
        is_ancestor = (key < num_nodes) & scope.ancestors[batch_idx, query, key_node]
        key_position = torch.where(is_verified, kv_idx, length + scope.depths[batch_idx, key_node])
        query_position = length + scope.depths[batch_idx, query]
        return (is_verified | is_ancestor) & mask_function(batch_idx, head_idx, query_position, key_position)

    return inner


def _wrap_mask(build_mask: Callable) -> Callable:
    @wraps(build_mask)
    def build_tree_mask(*args, **kwargs):
        scope = _tree.get()
        if scope is None or kwargs.get("q_length") != scope.depths.shape[1]:
            return build_mask(*args, **kwargs)
        kwargs["mask_function"] = tree_mask_function(
            scope.to(kwargs.get("device", scope.depths.device)),
            kwargs.get("mask_function", causal_mask_function),
            kwargs.get("q_offset", 0),
        )
        kwargs["allow_is_causal_skip"] = False
        return build_mask(*args, **kwargs)

    return build_tree_mask


# --- what attention looks like ---


@contextmanager
def observe_attention(
    modules: Sequence[nn.Module], observer: AttentionObserver, queries: torch.Tensor | None = None
) -> Iterator[None]:
    """Show `observer` the attention probabilities of `modules` (attention modules with a `config`), chunk by chunk.

    No implementation has to return its probabilities: they are computed anew from queries and keys, `QUERY_CHUNK`
    queries at a time, or taken over from eager attention, which makes them anyway. Of each forward's queries only those
    with an index in `queries` (n,) are shown, and paid for; by default all.
    """
    implementations = {_implementation(module) for module in modules}
    token = _observed.set({**(_observed.get() or {}), **{id(module): (observer, queries) for module in modules}})
    with ExitStack() as stack:
        stack.callback(_observed.reset, token)
        stack.enter_context(_attention_wraps.installed([name for name in implementations if name != "eager"]))
        for module in modules:
            if _implementation(module) == "eager":
                stack.callback(module.register_forward_hook(_show_eager).remove)
        yield


def attention_chunks(
    query: torch.Tensor,  # (B, heads, Q, head_dim)
    key: torch.Tensor,  # (B, key heads, K, head_dim)
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    queries: torch.Tensor | None = None,  # (n,)
) -> Iterator[torch.Tensor]:
    """Attention probabilities (B, heads, up to `QUERY_CHUNK`, K) in float32 or better; causal without a 4D mask.

    A query that sees nothing (padding) has probability zero everywhere. Only the queries with an index in `queries` are
    looked at, by default all.
    """
    num_queries, num_keys, head_dim = query.shape[2], key.shape[2], key.shape[3]
    key = _upcast(key).transpose(2, 3)
    positions = torch.arange(num_keys, device=query.device)
    # A chunk's scores have a quarter of the elements of all queries: little beside what the layer itself needs.
    size = min(QUERY_CHUNK, max(MIN_QUERY_CHUNK, num_queries * head_dim // (4 * num_keys)))
    for chunk in _query_chunks(queries, num_queries, size, query.device):
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            part = mask[:, :, chunk, :num_keys]
            hidden = ~part if part.dtype == torch.bool else part <= torch.finfo(part.dtype).min / 2
        else:
            hidden = positions > positions[num_keys - num_queries :][chunk, None]
            if isinstance(mask, torch.Tensor) and mask.ndim == 2:
                hidden = hidden | ~mask[:, None, None, -num_keys:].bool()
        yield _probabilities(query[:, :, chunk], key, hidden, scaling, softcap)


def _probabilities(
    query: torch.Tensor,  # (B, heads, n, head_dim)
    key: torch.Tensor,  # (B, key heads, head_dim, K), float32 or better
    hidden: torch.Tensor,  # broadcasts to (B, heads, n, K)
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    groups = query.to(key.dtype).unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # keys are shared, not repeated
    scores = (groups @ key).mul_(scaling).view(*query.shape[:3], -1)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores.masked_fill_(hidden, -torch.inf).softmax(-1).nan_to_num_(0.0)


def _upcast(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32, or in their own type where that is wider."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _query_chunks(
    queries: torch.Tensor | None, num_queries: int, size: int, device: torch.device
) -> Iterator[torch.Tensor | slice]:
    """Indices of queries, `size` at a time: views where all are wanted."""
    if queries is not None:
        yield from queries.to(device).split(size)
        return
    for start in range(0, num_queries, size):
        yield slice(start, min(start + size, num_queries))


def attention_received(chunks: Iterator[torch.Tensor], is_counted: torch.Tensor | None = None) -> torch.Tensor:
    """What each key gets, summed over heads and queries (paper, section 3.3): chunks (B, heads, Q, K) -> (B, K).

    Only queries where `is_counted` (B, Q) holds give, by default all.
    """
    received, start = [], 0
    for chunk in chunks:
        per_query = chunk.sum(1)
        if is_counted is not None:
            counted = is_counted[:, start : start + chunk.shape[2], None].to(chunk.device)
            per_query = per_query.masked_fill(~counted, 0.0)
        received.append(per_query.sum(1))
        start += chunk.shape[2]
    return torch.stack(received).sum(0)


def attention_entropy(chunks: Iterator[torch.Tensor]) -> torch.Tensor:
    """-sum_j A_ij log A_ij of every query, averaged over heads (paper, section 3.2): (B, heads, Q, K) -> (B, Q)."""
    return torch.cat([torch.special.entr(chunk).sum(-1).mean(1) for chunk in chunks], dim=1)


def _implementation(module: Any) -> str:
    return module.config._attn_implementation


def _wrap_attention(attend: Callable) -> Callable:
    @wraps(attend)
    def attend_and_show(module, query, key, value, attention_mask, *args, **kwargs):
        observer, queries = (_observed.get() or {}).get(id(module), (None, None))
        if observer is not None:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            observer(module, attention_chunks(query, key, attention_mask, scaling, kwargs.get("softcap"), queries))
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attend_and_show


def _show_eager(module: nn.Module, args: tuple, output: Any) -> None:
    observer, queries = (_observed.get() or {}).get(id(module), (None, None))
    if observer is not None:
        shown = output[1] if queries is None else output[1][:, :, queries.to(output[1].device)]
        observer(module, iter([_upcast(shown)]))


_mask_wraps = _RegistryWraps(AttentionMaskInterface, _wrap_mask)
_attention_wraps = _RegistryWraps(AttentionInterface, _wrap_attention)
