"""The drafter's forward for decoding: the computation of `modeling_dream`, without what modules cost on the way.

A draft level is a few tokens wide, and in a small drafter Python takes longer than the arithmetic: module calls, attribute
lookups, rotary angles computed anew. Here the weights are looked up once per `generate()` (they are shared, not copied),
and the rotary angles of all levels of a tree are computed together. `tests/test_lean.py` holds the two forms together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from transformers.cache_utils import Cache

from .modeling import DreamModel

Function = Callable[[torch.Tensor], torch.Tensor]
Angles = tuple[torch.Tensor, torch.Tensor]  # cosines, and sines with a negative first half: (B, 1, T, head_dim) each


def lean_drafter(drafter: DreamModel) -> LeanDrafter | None:
    """The lean form of a drafter, or None for one that only its modules can run.

    That is one with a forward of its own, with hooks, adapters or quantised weights, one in training, and one with another
    attention than `"sdpa"`.
    """
    is_plain = type(drafter).forward is DreamModel.forward and all(_is_plain(module) for module in drafter.modules())
    if not is_plain or drafter.training or drafter.config._attn_implementation != "sdpa":
        return None
    return LeanDrafter(drafter)


class LeanDrafter:
    """A drafter as a function for decoding. It holds the drafter's own weights: make a new one when they are replaced.

    Args:
        drafter (`DreamModel`): One that [`lean_drafter`] accepts.
    """

    def __init__(self, drafter: DreamModel):
        self.input_norm, self.feature_norm = _function(drafter.input_norm), _function(drafter.feature_norm)
        self.norm = _function(drafter.norm)
        self.rotary = drafter.rotary_emb
        self.blocks: list[Any] = [
            (_CrossBlock if kind == "cross" else _SelfBlock)(layer, index)
            for index, (kind, layer) in enumerate(zip(drafter.config.block_types, drafter.layers, strict=True))
        ]

    def __call__(
        self,
        embeds: torch.Tensor,  # (B, T, H)
        features: torch.Tensor,  # (B, S, H)
        sees: torch.Tensor,  # (B, T, columns), the keys each token sees, of which there may be fewer than columns
        angles: Angles,
        cache: Cache,
    ) -> torch.Tensor:
        """Features (B, T, H) of T new tokens behind those in the cache, as `DreamModel.forward` computes them.

        Column c stands for token c and for feature c - 1. Every token sees a feature.
        """
        hidden = self.input_norm(embeds)
        bias = sees.unsqueeze(1).to(embeds.dtype).log()  # 0 or -inf, once for all blocks
        scene = _Scene(self.feature_norm(features), bias, bias[..., 1:], *angles, cache)
        for block in self.blocks:
            hidden = block(hidden, scene)
        return self.norm(hidden)

    def angles(self, like: torch.Tensor, positions: torch.Tensor) -> Angles:
        """Rotary angles at `positions` (B, T), in the dtype of `like`."""
        cos, sin = self.rotary(like, positions)
        first, second = sin.chunk(2, dim=-1)
        return cos.unsqueeze(1), torch.cat([-first, second], dim=-1).unsqueeze(1)


@dataclass(frozen=True)
class _Scene:
    """What all blocks of one forward share."""

    features: torch.Tensor  # (B, S, H)
    token_bias: torch.Tensor  # (B, 1, T, K), added to what self-attention finds
    feature_bias: torch.Tensor  # (B, 1, T, F), the same for cross-attention
    cos: torch.Tensor  # (B, 1, T, head_dim)
    sin: torch.Tensor  # the same, negative in its first half
    cache: Cache


class _Attention:
    """The projections of one attention, and its heads."""

    def __init__(self, attention: Any, layer_idx: int):
        self.layer_idx = layer_idx
        self.head_dim, self.is_grouped = attention.head_dim, attention.num_key_value_groups > 1
        self.query, self.key = _function(attention.q_proj), _function(attention.k_proj)
        self.value, self.out = _function(attention.v_proj), _function(attention.o_proj)

    def heads(self, projected: torch.Tensor) -> torch.Tensor:
        """(B, T, heads * head_dim) -> (B, heads, T, head_dim)."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """Attention to all keys in the cache, the new ones included: (B, heads, T, head_dim)."""
        keys, values = cache.update(keys, values, self.layer_idx)
        bias = bias[..., : keys.shape[2]]
        return scaled_dot_product_attention(queries, keys, values, attn_mask=bias, enable_gqa=self.is_grouped)


class _Mlp:
    def __init__(self, mlp: Any):
        self.gate, self.up, self.down = _function(mlp.gate_proj), _function(mlp.up_proj), _function(mlp.down_proj)
        self.activation = mlp.act_fn

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(self.activation(self.gate(hidden)) * self.up(hidden))


class _SelfBlock:
    def __init__(self, block: Any, layer_idx: int):
        self.attention, self.mlp = _Attention(block.self_attn, layer_idx), _Mlp(block.mlp)
        self.input_norm, self.mlp_norm = _function(block.input_layernorm), _function(block.post_attention_layernorm)

    def __call__(self, hidden: torch.Tensor, scene: _Scene) -> torch.Tensor:
        attention, normed = self.attention, self.input_norm(hidden)
        queries = _rotate(attention.heads(attention.query(normed)), scene)
        keys = _rotate(attention.heads(attention.key(normed)), scene)
        values = attention.heads(attention.value(normed))
        attended = attention.attend(queries, keys, values, scene.token_bias, scene.cache)
        hidden = hidden + attention.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.mlp_norm(hidden))


class _CrossBlock:
    def __init__(self, block: Any, layer_idx: int):
        self.attention, self.mlp = _Attention(block.cross_attn, layer_idx), _Mlp(block.mlp)
        self.query_norm, self.key_norm = _function(block.cross_attn.q_norm), _function(block.cross_attn.k_norm)
        self.input_norm, self.mlp_norm = _function(block.input_layernorm), _function(block.post_attention_layernorm)
        self.attention_gate = block.cross_attn_attn_gate.detach().tanh()
        self.mlp_gate = block.cross_attn_mlp_gate.detach().tanh()

    def __call__(self, hidden: torch.Tensor, scene: _Scene) -> torch.Tensor:
        attention, features = self.attention, scene.features
        queries = self.query_norm(attention.heads(attention.query(self.input_norm(hidden))))
        keys = self.key_norm(attention.heads(attention.key(features)))
        values = attention.heads(attention.value(features))
        attended = attention.attend(queries, keys, values, scene.feature_bias, scene.cache)
        hidden = torch.addcmul(hidden, self.attention_gate, attention.out(attended.transpose(1, 2).flatten(2)))
        return torch.addcmul(hidden, self.mlp_gate, self.mlp(self.mlp_norm(hidden)))


def _rotate(states: torch.Tensor, scene: _Scene) -> torch.Tensor:
    """Rotary embedding of (B, heads, T, head_dim): dimension i pairs with i + head_dim / 2."""
    return torch.addcmul(states * scene.cos, states.roll(states.shape[-1] // 2, dims=-1), scene.sin)


def _function(module: nn.Module) -> Function:
    """A module's computation as a plain function of its weights."""
    if isinstance(module, nn.Linear):
        return partial(linear, weight=module.weight, bias=module.bias)
    if isinstance(module, nn.RMSNorm):
        if module.weight.device.type == "cpu" and module.weight.dtype in (torch.float32, torch.float64):
            size, eps = module.weight.numel(), module.eps
            dtype = module.weight.dtype
            floor = torch.tensor(math.sqrt(size * (torch.finfo(dtype).eps if eps is None else eps)), dtype=dtype)
            return partial(_norm_on_cpu, weight=module.weight * math.sqrt(size), floor=floor)
        return partial(rms_norm, normalized_shape=module.normalized_shape, weight=module.weight, eps=module.eps)
    return module  # identity


def _norm_on_cpu(hidden: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """RMS norm in half the time of PyTorch's, which has no kernel of its own there.

    With n entries, `weight` is sqrt(n) times the norm's and `floor` is sqrt(n * eps).
    """
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return hidden / torch.hypot(length, floor) * weight


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module does what its class says, and linear layers are PyTorch's own."""
    is_replaced = bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in module.__dict__
    is_adapted = hasattr(module, "weight") and type(module) not in (nn.Linear, nn.RMSNorm)
    return not is_replaced and not is_adapted
