"""Layers with state over draft trees, on transformers' own modules.

Such a layer calls two functions of its module: a convolution over the last few inputs and, most of them, a recurrence. In this
scope their names lead to wrappers. A wrapper calls the function, unless a [`StateLayer`] is being run in this thread: then it
computes the same over the tree's nodes, each of which goes on from its parent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

from ..runtime.recurrent import linear, selective
from ..runtime.recurrent.layers import StateLayer, current_layer
from .lookups import ScopedWrap
from .tree_masks import layer_index, text_attentions

CONVOLUTION = "causal_conv1d_fn"
STATE_KINDS = ("linear_attention", "conv")  # of layers that attend to nothing
STATELESS_KINDS = ("mlp", "moe")  # in transformers 5.20 their layers look like layers with state, and are never used


def tree_convolution(
    layer: StateLayer, hidden_states: Any, weight: Any, bias: Any = None, activation: str | None = None, **_: Any
) -> torch.Tensor:
    """What a convolution with `weight` (C, size) makes of each node's own window: (B, C, N * size) -> (B, C, N)."""
    size = weight.shape[-1]
    outputs = functional.conv1d(
        hidden_states.to(weight.dtype), weight[:, None], bias, stride=size, groups=weight.shape[0]
    )
    if activation is not None:
        outputs = ACT2FN[activation](outputs)
    layer.after_convolution()
    return outputs.to(hidden_states.dtype)


def tree_delta_rule(
    layer: StateLayer,
    query: torch.Tensor,  # (B, N, K, D)
    key: torch.Tensor,
    value: torch.Tensor,  # (B, N, H, E)
    g: torch.Tensor,  # (B, N, H), or (B, N, H, D) in Kimi's form
    beta: torch.Tensor,  # (B, N, H)
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gated delta rule: what each node reads, (B, N, H, E), and something in place of the last state."""
    state = _state_of(layer)
    queries, keys, values, log_decays, betas = (
        part.transpose(1, 2).to(_precise(state)) for part in (query, key, value, g, beta)
    )
    if use_qk_l2norm_in_kernel:
        queries, keys = (part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for part in (queries, keys))
    queries = queries * queries.shape[-1] ** -0.5
    if log_decays.ndim == 3:
        log_decays = log_decays[..., None]
    outputs, record = linear.over_tree(queries, keys, values, log_decays, state, layer.paths.ancestors, betas)
    layer.note(state, record)
    return outputs.transpose(1, 2).to(query.dtype, memory_format=torch.contiguous_format), state


def tree_chunk_scan(
    layer: StateLayer,
    hidden_states: torch.Tensor,  # (B, N, H, E)
    dt: torch.Tensor,  # (B, N, H)
    A: torch.Tensor,  # (H,)
    B: torch.Tensor,  # (B, N, K, D)
    C: torch.Tensor,
    D: torch.Tensor | None = None,  # (H,)
    dt_bias: torch.Tensor | None = None,  # (H,)
    dt_softplus: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2: as [`tree_delta_rule`]. Limits of `dt` are left out, as they are where tokens come one by one."""
    state = _state_of(layer)
    precise = _precise(state)
    dt = _step_sizes(dt, dt_bias, dt_softplus).to(precise)
    inputs, keys, queries = (part.transpose(1, 2).to(precise) for part in (hidden_states, B, C))
    steps = dt.transpose(1, 2)[..., None]  # (B, H, N, 1)
    log_decays = steps * A.to(precise)[:, None, None]
    outputs, record = linear.over_tree(queries, keys, inputs * steps, log_decays, state.mT, layer.paths.ancestors)
    layer.note(state.mT, record)
    if D is not None:
        outputs = outputs + D[:, None, None] * inputs
    return outputs.transpose(1, 2).contiguous(), state


def tree_selective_scan(
    layer: StateLayer,
    hidden_states: torch.Tensor,  # (B, d, N)
    dt: torch.Tensor,  # (B, d, N)
    A: torch.Tensor,  # (d, S)
    B: torch.Tensor,  # (B, S, N)
    C: torch.Tensor,
    D: torch.Tensor | None = None,  # (d,)
    z: torch.Tensor | None = None,  # (B, d, N)
    delta_bias: torch.Tensor | None = None,  # (d,)
    delta_softplus: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba: what each node reads, (B, d, N), as [`tree_delta_rule`]. Zamba calls it once for each of its heads."""
    whole = _state_of(layer)
    state = whole[:, len(layer.records)] if whole.ndim == 4 else whole
    bias = None if delta_bias is None else delta_bias[:, None]
    steps, inputs, writes, reads = (
        part.transpose(1, 2).to(_precise(state))
        for part in (_step_sizes(dt, bias, delta_softplus), hidden_states, B, C)
    )
    record = selective.SelectiveSteps(A.to(steps.dtype), steps, steps * inputs, writes)
    outputs = selective.over_tree(record, reads, state, layer.paths.parents).transpose(1, 2)
    layer.note(state, record)
    if D is not None:
        outputs = outputs + hidden_states * D[:, None]
    if z is not None:
        outputs = outputs * functional.silu(z)
    return outputs, state


def _state_of(layer: StateLayer) -> torch.Tensor:
    assert layer.state is not None  # it has a recurrence
    return layer.state


def _precise(state: torch.Tensor) -> torch.dtype:
    """What transformers computes recurrences in: float32 at least, as it keeps their states."""
    return torch.promote_types(state.dtype, torch.float32)


def _step_sizes(dt: torch.Tensor, bias: torch.Tensor | None, is_soft: bool) -> torch.Tensor:
    """Mamba's time steps from what a layer projected."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(dt) if is_soft else dt


RECURRENCES: dict[str, Callable[..., Any]] = {
    "torch_chunk_gated_delta_rule": tree_delta_rule,
    "chunk_kimi_delta_attention": tree_delta_rule,
    "mamba2_chunk_scan": tree_chunk_scan,
    "mamba_selective_scan": tree_selective_scan,
}


@contextmanager
def trees_of_states(decoder: nn.Module) -> Iterator[None]:
    """Let the layers with state of a text decoder verify trees, where their cache layers are [`StateLayer`]s."""
    with ExitStack() as stack:
        for module in dict.fromkeys(_module_of(mixer) for mixer in state_mixers(decoder)):
            for name in (CONVOLUTION, *RECURRENCES):
                if hasattr(module, name):
                    stack.enter_context(_wrap_of(module, name).installed())
        yield


def state_mixers(decoder: nn.Module) -> list[nn.Module]:
    """The modules of a decoder that keep a state: those that convolve along the text."""
    return [
        module
        for module in decoder.modules()
        if layer_index(module) is not None and any(isinstance(child, nn.Conv1d) for child in module.children())
    ]


def attending_modules(decoder: Any, mixers: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules of a decoder that attend, and the layers around them; its `mixers` keep a state instead."""
    kinds = enumerate(getattr(decoder.config, "layer_types", None) or ())
    stateless = {index for index, kind in kinds if kind in STATELESS_KINDS}
    numbered = text_attentions(decoder)
    others = {*mixers, *(module for module in numbered if layer_index(module) in stateless)}
    shared = (module for name, module in decoder.named_modules() if name.endswith(".self_attn"))  # by several layers
    return [module for module in dict.fromkeys((*numbered, *shared)) if module not in others]


def keeps_state(text_config: Any) -> bool:
    """Whether some layers of a text model keep a state."""
    return any(map(_is_stateful, DynamicCache(config=text_config).layers))


def _is_stateful(layer: Any) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def unsuitable_states(decoder: nn.Module, text_config: Any) -> str | None:
    """What keeps the layers with state of a text model from verifying trees, or None."""
    layers: list[Any] = DynamicCache(config=text_config).layers
    if not any(map(_is_stateful, layers)):
        return None
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return "no layer attends, so that nothing tells how long a text is"
    kinds = getattr(text_config, "layer_types", None) or [None] * len(layers)
    mixers = {layer_index(mixer): mixer for mixer in state_mixers(decoder)}
    for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True)):
        if not _is_stateful(layer) or kind in STATELESS_KINDS:
            continue
        reason = "it has more than one state" if layer.number_of_states > 1 else _unknown(mixers.get(index), kind)
        if reason is not None:
            return f"of layer {index} ({kind}) {reason}"
    return None


def _unknown(mixer: Any, kind: str | None) -> str | None:
    """Why what a module does to a state cannot be done over a tree, or None."""
    if mixer is None:
        return "no module is known to keep the state"
    module = _module_of(mixer)
    if not hasattr(module, CONVOLUTION):
        return f"`{type(mixer).__name__}` calls no `{CONVOLUTION}`"
    if kind != "conv" and not any(hasattr(module, name) for name in RECURRENCES):
        return f"`{type(mixer).__name__}` calls none of {', '.join(RECURRENCES)}"
    if getattr(mixer.forward, "__module__", module.__name__) != module.__name__:
        return f"a kernel runs in place of `{type(mixer).__name__}` (load the target without `use_kernels`)"
    return None


def _module_of(mixer: nn.Module) -> ModuleType:
    return sys.modules[type(mixer).__module__]


def _wrap(name: str, function: Callable) -> Callable:
    in_tree = tree_convolution if name == CONVOLUTION else RECURRENCES[name]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        layer = current_layer()
        return function(*args, **kwargs) if layer is None else in_tree(layer, *args, **kwargs)

    return call


_wraps: dict[tuple[str, str], ScopedWrap] = {}


def _wrap_of(module: ModuleType, name: str) -> ScopedWrap:
    """The one wrap of a function of a module."""
    return _wraps.setdefault((module.__name__, name), ScopedWrap(module, name, lambda function: _wrap(name, function)))
