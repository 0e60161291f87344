"""One more decoder layer of a target's family, as its multi-token prediction has one: attending to the whole text."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from .target import Target

FULL_ATTENTION = "full_attention"
# Text models whose checkpoints bring a head that joins normed embedding and normed feature, in this order, before such a layer.
MTP_FAMILIES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


@dataclass(frozen=True)
class AttendingLayer:
    """What such a layer, and what stands around it, is made of.

    Args:
        config (`PreTrainedConfig`): The target's text config, for a decoder of this one layer.
        layer (`type`): Class of the layer, made of a config and its index.
        norm (`type`): Class of the decoder's norms, made of a width and `eps`.
        rotary (`torch.nn.Module`): The decoder's rotary embedding, a copy with buffers of its own.
        has_planes (`bool`): Whether it takes positions of time, height and width.
    """

    config: PreTrainedConfig
    layer: type[nn.Module]
    norm: Any
    rotary: nn.Module
    has_planes: bool


def attending_layer(target: Target, attention: str, is_dense: bool = False) -> AttendingLayer:
    """The layer of a target's family.

    Args:
        target (`Target`): The target, which is not changed.
        attention (`str`): By which name the layer looks its attention up.
        is_dense (`bool`): An MLP in place of experts, in families whose layers have the one or the other.

    Raises:
        ValueError: No layer of the target attends to the whole text.
    """
    decoder, config = target.decoder, copy.deepcopy(target.text_config)
    kinds = getattr(config, "layer_types", None) or [FULL_ATTENTION] * config.num_hidden_layers
    if FULL_ATTENTION not in kinds:
        raise ValueError(
            f"no layer of `{type(target.model).__name__}` attends to the whole text ({sorted(set(kinds))})"
        )
    config.layer_types, config.num_hidden_layers = [FULL_ATTENTION], 1
    if hasattr(config, "mlp_only_layers"):
        config.mlp_only_layers, config.decoder_sparse_step = [0] if is_dense else [], 1
    config._attn_implementation = attention
    return AttendingLayer(
        config=config,
        layer=type(decoder.layers[kinds.index(FULL_ATTENTION)]),
        norm=type(decoder.norm),
        rotary=_own_rotary(decoder.rotary_emb, config),
        has_planes=hasattr(decoder.rotary_emb, "mrope_section"),
    )


def _own_rotary(rotary: Any, config: PreTrainedConfig) -> nn.Module:
    """Another of the same class with the same frequencies, without the hooks that spread a target over devices."""
    own = type(rotary)(config)
    for name, buffer in rotary.named_buffers():
        setattr(own, name, buffer.detach().clone())
    return own


def angles_of(rotary: nn.Module, positions: torch.Tensor, like: torch.Tensor, has_planes: bool) -> Any:
    """What a decoder's layers are given of positions (B, T) or (3, B, T), for states (B, T, H) like these."""
    if has_planes and positions.ndim == 2:
        positions = positions.expand(3, -1, -1)
    return rotary(like, positions)
