"""Llama's layer as published drafters have it: inputs of any width, norms of queries and keys, and told who sees what.

B rows of a batch, T new rows, H `hidden_size`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from .attention import Angles, attend, remembered, rotated, split_heads
from .layer_config import LayerConfig
from .visibility import Visibility


class DrafterAttention(LlamaAttention):
    """Llama's attention with inputs of any width, told who sees what; with norms of queries and keys as Qwen3's."""

    def __init__(self, config: LayerConfig, layer_idx: int, input_size: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        query_size, key_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))  # type: ignore[operator]
        self.q_proj = nn.Linear(input_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = norm_of(config, self.head_dim, config.has_qk_norm)
        self.k_norm = norm_of(config, self.head_dim, config.has_qk_norm)

    @property
    def implementation(self) -> str | None:
        """The attention function's name in transformers."""
        return self.config._attn_implementation

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # (B, T, input_size)
        seen: Visibility,
        angles: Angles,  # (B, 1, T, head_dim) each
        cache: Cache | None = None,
    ) -> torch.Tensor:
        queries = rotated(self.q_norm(split_heads(self.q_proj(hidden_states), self)), angles)
        keys, values = self.keys_and_values(hidden_states, angles)
        keys, values = remembered(keys, values, seen, cache, self.layer_idx)  # type: ignore[arg-type]
        return self.o_proj(attend(self, queries, keys, values, seen).flatten(2))

    def keys_and_values(self, hidden_states: torch.Tensor, angles: Angles) -> tuple[torch.Tensor, torch.Tensor]:
        """What others see of rows (B, T, input_size), keys turned: (B, key_value_heads, T, head_dim) each."""
        keys = rotated(self.k_norm(split_heads(self.k_proj(hidden_states), self)), angles)
        return keys, split_heads(self.v_proj(hidden_states), self)


class DrafterLayer(nn.Module):
    """Llama's layer, with or without an input norm."""

    def __init__(self, config: LayerConfig, layer_idx: int, has_input_norm: bool = True, width: int = 1):
        super().__init__()
        self.self_attn = DrafterAttention(config, layer_idx, width * config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = norm_of(config, config.hidden_size, has_input_norm)
        self.post_attention_layernorm = norm_of(config, config.hidden_size)

    def forward(
        self, hidden: torch.Tensor, seen: Visibility, angles: Angles, cache: Cache | None = None
    ) -> torch.Tensor:
        """(B, T, H) -> (B, T, H)."""
        return self.attended(hidden, self.input_layernorm(hidden), seen, angles, cache)

    def attended(
        self, residual: torch.Tensor, hidden: torch.Tensor, seen: Visibility, angles: Angles, cache: Cache | None
    ) -> torch.Tensor:
        """`residual` (B, T, H) and what attention and MLP add to it, of which the former reads `hidden` (B, T, width * H)."""
        residual = residual + self.self_attn(hidden, seen, angles, cache)
        return residual + self.mlp(self.post_attention_layernorm(residual))


def norm_of(config: LayerConfig, size: int, is_norm: bool = True) -> nn.Module:
    """An RMS norm, or what changes nothing where there is none."""
    return nn.RMSNorm(size, eps=config.rms_norm_eps) if is_norm else nn.Identity()
