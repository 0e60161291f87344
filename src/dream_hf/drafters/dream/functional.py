"""A drafter's forward for decoding: the arithmetic of `blocks` over plain functions of the drafter's weights.

A draft level is a few tokens wide, and in a small drafter Python takes longer than the arithmetic: module calls, attribute
lookups, rotary angles computed anew. Here the weights are looked up once per `generate()` (they are shared, not copied),
and the rotary angles of all levels of a tree are computed together. A submodule that does more than its class says (hooks,
adapters, quantised weights, another attention than `"sdpa"`) stays as it is and is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaMLP

from ..attention import added
from ..stacking import Stack, stacked
from ..visibility import DraftMasks, Visibilities
from .blocks import (
    cross_attention,
    cross_attention_block,
    rotary_angles,
    run_blocks,
    self_attention,
    self_attention_block,
)
from .modeling import (
    DreamCrossAttention,
    DreamCrossAttentionBlock,
    DreamModel,
    DreamSelfAttention,
    DreamSelfAttentionBlock,
)

COMPUTATIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    DreamSelfAttentionBlock: self_attention_block,
    DreamCrossAttentionBlock: cross_attention_block,
    DreamSelfAttention: self_attention,
    DreamCrossAttention: cross_attention,
}
# Layers of one input that are read as one, by the name for all of them.
STACKS: dict[type[nn.Module], dict[str, tuple[str, ...]]] = {
    DreamSelfAttention: {"qkv_proj": ("q_proj", "k_proj", "v_proj")},
    DreamCrossAttention: {"kv_proj": ("k_proj", "v_proj")},
    LlamaMLP: {"gate_up_proj": ("gate_proj", "up_proj")},
}


def decoding_forward(drafter: DreamModel) -> DecodingForward:
    """The fastest forward that computes what calling the drafter computes."""
    is_own = type(drafter).forward is DreamModel.forward and _is_plain(drafter)
    return DecodingForward(drafter) if is_own else WholeForward(drafter)


class DecodingForward:
    """A drafter as a function for decoding. It holds the drafter's own weights: make a new one when they are replaced.

    Args:
        drafter (`DreamModel`): One whose own forward is that of its class.
    """

    def __init__(self, drafter: DreamModel):
        self.parts: Any = _Parts(drafter)

    def __call__(self, embeds: Tensor, features: Tensor, seen: Visibilities, places: Any, cache: Cache) -> Tensor:
        """Features (B, T, H) of T new tokens behind those in the cache, as `DreamModel.forward` computes them."""
        return run_blocks(self.parts, self.parts.input_norm(embeds), features, seen, places, cache)[0]

    def places(self, like: Tensor, positions: Tensor) -> Any:
        """What tells where tokens at `positions` (B, T) stand: their rotary angles, in the dtype of `like`."""
        return rotary_angles(self.parts.rotary_emb, like, positions)

    def places_of_levels(self, like: Tensor, positions: Tensor) -> list[Any]:
        """The same for levels of a tree, each of which has one of the `positions` (B, L)."""
        cos, sin = self.places(like, positions)
        return list(zip(cos.split(1, dim=2), sin.split(1, dim=2), strict=True))


class WholeForward(DecodingForward):
    """A drafter that has a forward of its own, or hooks around it."""

    def __init__(self, drafter: DreamModel):
        self.drafter = drafter

    def __call__(self, embeds: Tensor, features: Tensor, seen: Visibilities, places: Any, cache: Cache) -> Tensor:
        outputs = self.drafter(
            embeds,
            features,
            attention_mask=DraftMasks(seen.tokens, seen.features),
            position_ids=places.expand(-1, embeds.shape[1]),
            past_key_values=cache,
        )
        return outputs.last_hidden_state

    def places(self, like: Tensor, positions: Tensor) -> Any:
        return positions

    def places_of_levels(self, like: Tensor, positions: Tensor) -> list[Any]:
        return list(positions.split(1, dim=1))


class _Parts:
    """Stands in for a module: it has the module's attributes, and plain functions by the names of its submodules."""

    def __init__(self, module: Any):
        vars(self).update((name, value) for name, value in vars(module).items() if not name.startswith("_"))
        for name, child in module.named_children():
            setattr(self, name, function_of(child))
        for name in getattr(module, "fixed_in_decoding", ()):
            setattr(self, name, getattr(module, name))
        for name, layers in STACKS.get(type(module), {}).items():
            setattr(self, name, _stack_of([getattr(module, layer) for layer in layers]))


class _Linear:
    """A linear layer, or several of one input, as a function."""

    def __init__(self, layer: nn.Linear | Stack):
        self.weight, self.bias = layer.weight, layer.bias

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)

    def onto(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """What the layer makes of (B, T, in), and `residual` (B, T, out)."""
        if self.bias is not None or hidden.dtype != residual.dtype:  # autocast may want them to differ
            return residual + self(hidden)
        return torch.addmm(residual.flatten(0, 1), hidden.flatten(0, 1), self.weight.t()).view_as(residual)


class _MLP:
    """Llama's MLP as a function."""

    def __init__(self, module: LlamaMLP):
        self.parts: Any = _Parts(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.parts.down_proj(self._inner(hidden))

    def onto(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """What the MLP makes of (B, T, H), and `residual` (B, T, H)."""
        return added(residual, self.parts.down_proj, self._inner(hidden))

    def _inner(self, hidden: Tensor) -> Tensor:
        parts = self.parts
        if parts.gate_up_proj is None:
            return parts.act_fn(parts.gate_proj(hidden)) * parts.up_proj(hidden)
        gate, up = parts.gate_up_proj(hidden).chunk(2, dim=-1)
        return parts.act_fn(gate) * up


def _stack_of(layers: list[nn.Module]) -> _Linear | None:
    """Layers of one input as one, if they do nothing but what their class says and can be laid out so."""
    stack = stacked(layers) if all(_is_plain(layer) for layer in layers) else None
    return None if stack is None else _Linear(stack)


def function_of(module: Any) -> Any:
    """What calling a module computes as a plain function of its weights; the module where it may do more than that."""
    kind = type(module)
    if kind is nn.ModuleList:
        return [function_of(child) for child in module.children()]
    if not _is_plain(module):
        return module
    if kind in COMPUTATIONS:
        return partial(COMPUTATIONS[kind], _Parts(module))
    make: Any = {LlamaMLP: _MLP, nn.Linear: _Linear, nn.RMSNorm: _norm_of}.get(kind)
    return module if make is None else make(module)


def is_plain_throughout(drafter: DreamModel) -> bool:
    """Whether all of a drafter's weights are in plain functions, so that its forward can be compiled without surprises."""
    return type(drafter).forward is DreamModel.forward and all(
        _is_plain(module) and (not hasattr(module, "weight") or type(module) in (nn.Linear, nn.RMSNorm))
        for module in drafter.modules()
    )


def _is_plain(module: Any) -> bool:
    """Whether calling a module does what its class says, and attention is PyTorch's own."""
    is_replaced = bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__
    is_attention = isinstance(module, DreamSelfAttention | DreamCrossAttention)
    return not is_replaced and not (is_attention and module.implementation != "sdpa")


def _norm_of(norm: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    weight, eps = norm.weight, norm.eps
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        return partial(rms_norm, normalized_shape=norm.normalized_shape, weight=weight, eps=eps)
    size, dtype = weight.numel(), weight.dtype
    least = math.sqrt(size * (torch.finfo(dtype).eps if eps is None else eps))
    floor = torch.tensor(least, dtype=dtype, device=weight.device)
    return partial(_norm_on_cpu, weight=weight * math.sqrt(size), floor=floor)


def _norm_on_cpu(hidden: Tensor, weight: Tensor, floor: Tensor) -> Tensor:
    """RMS norm in half the time of PyTorch's, which has no kernel of its own there.

    With n entries, `weight` is sqrt(n) times the norm's and `floor` is sqrt(n * eps).
    """
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden / torch.hypot(length, floor) * weight
