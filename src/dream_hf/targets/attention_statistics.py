"""What a layer's attention looks like, and what it is given, whatever implementation it runs with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

from .hooks import after_own_forwards
from .lookups import ScopedWrap, wrapped_lookup

QUERY_CHUNK, MIN_QUERY_CHUNK = 256, 16


@dataclass
class ArgumentRecord:
    """What the attention of some layers was given beside queries, keys, values and mask.

    Args:
        num_calls (`int`): How often.
        dropped (`set[str]`): Names of what `"sdpa"` takes no notice of, or refuses.
    """

    num_calls: int = 0
    dropped: set[str] = field(default_factory=set)

    @property
    def suits_sdpa(self) -> bool:
        """Whether `"sdpa"` is known to compute the same."""
        return self.num_calls > 0 and not self.dropped


# Called with a module and, for consecutive chunks of queries, probabilities (B, heads, queries, K).
AttentionObserver = Callable[[nn.Module, Iterator[torch.Tensor]], None]

# By id of an attention module: where its arguments are noted.
_noted: ContextVar[dict[int, ArgumentRecord] | None] = ContextVar("dream_hf_noted", default=None)
# By id of an attention module: who watches it, and which of its queries (None for all).
_Watch = tuple[AttentionObserver, torch.Tensor | None]
_observed: ContextVar[dict[int, _Watch] | None] = ContextVar("dream_hf_observed", default=None)


@contextmanager
def observe_attention(
    modules: Sequence[nn.Module], observer: AttentionObserver, queries: torch.Tensor | None = None
) -> Iterator[None]:
    """Show `observer` the attention probabilities of `modules` (attention modules with a `config`), chunk by chunk.

    No implementation has to return its probabilities: they are computed anew from queries and keys, `QUERY_CHUNK`
    queries at a time, or taken over from eager attention, which makes them anyway. Of each forward's queries only those
    with an index in `queries` (n,) are shown, and paid for; by default all.
    """
    token = _observed.set({**(_observed.get() or {}), **{id(module): (observer, queries) for module in modules}})
    eager = [module for module in modules if _implementation(module) == "eager"]
    try:
        with _attention_wrap.installed(), after_own_forwards(eager, _show_eager):
            yield
    finally:
        _observed.reset(token)


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
    groups = torch.unflatten(query.to(key.dtype), 1, (key.shape[1], -1)).flatten(2, 3)  # keys are shared, not repeated
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


def _wrap_attention(name: str, attend: Callable) -> Callable:
    observed, noted = _observed.get() or {}, _noted.get() or {}
    if not observed and not noted:
        return attend

    @wraps(attend)
    def attend_and_show(module, query, key, value, attention_mask, *args, **kwargs):
        observer, queries = observed.get(id(module), (None, None))
        if observer is not None and name != "eager":  # which is shown by a hook
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            observer(module, attention_chunks(query, key, attention_mask, scaling, kwargs.get("softcap"), queries))
        if id(module) in noted:
            noted[id(module)].num_calls += 1
            noted[id(module)].dropped |= _dropped_by_sdpa(kwargs)
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attend_and_show


@contextmanager
def note_arguments(modules: Sequence[nn.Module]) -> Iterator[ArgumentRecord]:
    """Note what the attention of `modules` is given in the block by layers that look their implementation up."""
    record = ArgumentRecord()
    token = _noted.set(dict.fromkeys(map(id, modules), record))
    try:
        with _attention_wrap.installed():
            yield record
    finally:
        _noted.reset(token)


def _dropped_by_sdpa(kwargs: dict[str, Any]) -> set[str]:
    """Names of real numbers that have a say in attention (sinks, soft caps, biases) and that sdpa does not take."""
    extra = {name: kwargs[name] for name in kwargs.keys() - signature(sdpa_attention_forward).parameters.keys()}
    return {
        name
        for name, value in extra.items()
        if isinstance(value, float) or (isinstance(value, torch.Tensor) and value.is_floating_point())
    }


def _show_eager(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    observer, queries = (_observed.get() or {}).get(id(module), (None, None))
    if observer is not None:
        shown = output[1] if queries is None else output[1][:, :, queries.to(output[1].device)]
        observer(module, iter([_upcast(shown)]))


_attention_wrap = ScopedWrap(AttentionInterface, "__getitem__", wrapped_lookup(_wrap_attention))
