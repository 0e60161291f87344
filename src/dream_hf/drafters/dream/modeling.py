"""The drafter: an initial block, a cross-attention block that reads the target's features, a final block.

The modules hold the weights, under the names they are saved by; what they compute is in `blocks`. Shapes in this file: B
rows, T new tokens, S new features, H `hidden_size`; K and F are the tokens and the features that the self-attention and the
cross-attention can see, those in the cache included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from ..pretrained import StrictPreTrainedModel
from ..visibility import DraftMasks, Visibilities, Visibility, text_visibilities
from .blocks import (
    Angles,
    cross_attention,
    cross_attention_block,
    rotary_angles,
    run_blocks,
    self_attention,
    self_attention_block,
)
from .configuration import DreamConfig


@dataclass
class DreamDrafterOutput(ModelOutput):
    """Output of a drafter's forward.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, H)`): Features after the final norm; the target's head
            turns them into logits, and they stand in for the target's features of drafted tokens.
        mid_hidden_state (`torch.FloatTensor` of shape `(B, T, H)`): What enters the last block, trained towards an
            intermediate layer of the target (paper, section 3.2).
        cache (`Cache`, *optional*): The cache passed in, extended.
    """

    last_hidden_state: torch.FloatTensor | None = None
    mid_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None

    @property
    def past_key_values(self) -> Cache | None:
        """`cache`, by the name it had until transformers 5.23."""
        return self.cache


class DreamCrossAttention(nn.Module):
    """Attention of tokens to features: per-head RMS norm on queries and keys, no rotary embedding (paper, section 3.1)."""

    fixed_in_decoding = ("implementation",)

    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        num_key_value_heads: int = config.num_key_value_heads  # type: ignore[assignment]
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        query_size = config.num_attention_heads * self.head_dim
        key_size = num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    @property
    def implementation(self) -> str | None:
        """The attention function's name in transformers."""
        return self.config._attn_implementation

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, T, H)
        features: torch.Tensor,  # (B, S, H)
        seen: Visibility,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        return cross_attention(self, hidden_states, features, seen, past_key_values)


class DreamSelfAttention(LlamaAttention):
    """Llama's attention, told who sees what."""

    fixed_in_decoding = ("implementation",)

    @property
    def implementation(self) -> str | None:
        """The attention function's name in transformers."""
        return self.config._attn_implementation

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,  # (B, T, H)
        seen: Visibility,
        angles: Angles,  # (B, 1, T, head_dim) each
        past_key_values: Cache | None = None,
        residual: torch.Tensor | None = None,  # (B, T, H), which the output is added to
    ) -> torch.Tensor:
        return self_attention(self, hidden_states, seen, angles, past_key_values, residual)


class DreamCrossAttentionBlock(GradientCheckpointingLayer):
    """Cross-attention and an MLP, each behind a tanh gate that starts at `config.initial_gate`."""

    _can_checkpoint_with_cache = True  # training has one kind of cache, which takes a repeated update
    fixed_in_decoding = ("gates",)

    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__()
        self.cross_attn = DreamCrossAttention(config, layer_idx)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))
        self.mlp = LlamaMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def gates(self) -> tuple[torch.Tensor, torch.Tensor]:
        """How far the gates of the attention and of the MLP are open, (1,) each."""
        return self.cross_attn_attn_gate.tanh(), self.cross_attn_mlp_gate.tanh()

    def forward(self, hidden_states, features, seen, angles, past_key_values=None) -> torch.Tensor:
        return cross_attention_block(self, hidden_states, features, seen, angles, past_key_values)


class DreamSelfAttentionBlock(GradientCheckpointingLayer):
    """Causal self-attention and an MLP; the initial block has no input norm, the final one has."""

    _can_checkpoint_with_cache = True  # training has one kind of cache, which takes a repeated update

    def __init__(self, config: DreamConfig, layer_idx: int, has_input_norm: bool):
        super().__init__()
        self.self_attn = DreamSelfAttention(config, layer_idx)  # type: ignore[arg-type]
        self.mlp = LlamaMLP(config)
        self.input_layernorm = (
            nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if has_input_norm else nn.Identity()
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states, features, seen, angles, past_key_values=None) -> torch.Tensor:
        return self_attention_block(self, hidden_states, features, seen, angles, past_key_values)


class DreamPreTrainedModel(StrictPreTrainedModel):
    """Loading, saving and initialisation shared by DREAM models."""

    config_class = DreamConfig
    config: DreamConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    input_modalities = ["text"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["DreamSelfAttentionBlock", "DreamCrossAttentionBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DreamCrossAttentionBlock):
            nn.init.constant_(module.cross_attn_attn_gate, self.config.initial_gate)
            nn.init.constant_(module.cross_attn_mlp_gate, self.config.initial_gate)


class DreamModel(DreamPreTrainedModel):
    """The blocks and norms of a drafter (paper, section 3.1): embeddings and features in, features out."""

    draft_token_ids: torch.Tensor | None  # (draft_vocab_size,) rising, or None for all tokens

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.input_norm = _norm_or_identity(config, config.normalize_inputs)
        self.feature_norm = _norm_or_identity(config, config.normalize_features)
        self.layers = nn.ModuleList(_make_block(config, index) for index in range(len(config.block_types)))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        num_drafted = config.draft_vocab_size  # which tokens these are comes with the checkpoint or is set later
        self.register_buffer("draft_token_ids", None if num_drafted is None else torch.full((num_drafted,), -1))
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        target_features: torch.Tensor,
        *,
        attention_mask: torch.Tensor | DraftMasks | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> DreamDrafterOutput:
        """Run the three blocks over T new tokens and S new features.

        The token at position i sees the tokens up to i and the features of positions below i, that is the feature that
        produced it and those before it. In a full pass S = T - 1; with a cache, the features that came in since.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(B, T, H)`): The target's embeddings of the tokens, images merged.
            target_features (`torch.Tensor` of shape `(B, S, H)`): Features after the target's final norm or, for
                drafted tokens, this model's own.
            attention_mask (`torch.Tensor` of shape `(B, K)` or `DraftMasks`, *optional*): 1 for real tokens and 0 for
                padding, the tokens in the cache included; or the two masks themselves, as trees need them.
            position_ids (`torch.Tensor` of shape `(B, T)`, *optional*): Defaults to counting the real tokens.
            past_key_values (`Cache`, *optional*): Holds one layer for each block, extended in place.

        Returns:
            `DreamDrafterOutput`

        Raises:
            ValueError: Widths that are not `config.hidden_size`, or S that does not fit T.
        """
        self._check_inputs(inputs_embeds, target_features)
        seen = self._visibilities(inputs_embeds, target_features, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = _count_positions(attention_mask, inputs_embeds, self._cached_lengths(past_key_values)[0])
        hidden_states = self.input_norm(inputs_embeds)
        angles = rotary_angles(self.rotary_emb, hidden_states, position_ids)
        last, mid = run_blocks(self, hidden_states, target_features, seen, angles, past_key_values)
        return DreamDrafterOutput(
            last_hidden_state=last,  # type: ignore[arg-type]
            mid_hidden_state=mid,  # type: ignore[arg-type]
            cache=past_key_values,
        )

    def _check_inputs(self, inputs_embeds: torch.Tensor, target_features: torch.Tensor) -> None:
        for name, tensor in (("inputs_embeds", inputs_embeds), ("target_features", target_features)):
            if tensor.ndim != 3 or tensor.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"`{name}` has shape {tuple(tensor.shape)}; this drafter takes (batch, length, "
                    f"{self.config.hidden_size}). Was it trained for another target?"
                )

    def _visibilities(
        self,
        inputs_embeds: torch.Tensor,
        target_features: torch.Tensor,
        attention_mask: torch.Tensor | DraftMasks | None,
        past_key_values: Cache | None,
    ) -> Visibilities:
        if isinstance(attention_mask, DraftMasks):
            return attention_mask.visibilities()
        num_new = inputs_embeds.shape[1], target_features.shape[1]
        return text_visibilities(
            attention_mask, *num_new, *self._cached_lengths(past_key_values), inputs_embeds.device
        )

    def _cached_lengths(self, past_key_values: Cache | None) -> tuple[int, int]:
        """How many tokens and features the cache holds."""
        if past_key_values is None:
            return 0, 0
        lengths = {"tokens": 0, "features": 0}
        for index, block_type in enumerate(self.config.block_types):
            lengths["features" if block_type == "cross" else "tokens"] = past_key_values.get_seq_length(index)
        return lengths["tokens"], lengths["features"]


def _count_positions(
    attention_mask: torch.Tensor | DraftMasks | None, inputs_embeds: torch.Tensor, past_tokens: int
) -> torch.Tensor:
    batch, num_tokens, _ = inputs_embeds.shape
    if isinstance(attention_mask, torch.Tensor):
        counted = attention_mask.to(inputs_embeds.device).long().cumsum(-1) - 1
        return counted.clamp(min=0)[:, -num_tokens:]
    positions = torch.arange(past_tokens, past_tokens + num_tokens, device=inputs_embeds.device)
    return positions[None].expand(batch, -1)


def _make_block(config: DreamConfig, layer_idx: int) -> nn.Module:
    if config.block_types[layer_idx] == "cross":
        return DreamCrossAttentionBlock(config, layer_idx)
    return DreamSelfAttentionBlock(config, layer_idx, has_input_norm=config.block_types[layer_idx] == "final")


def _norm_or_identity(config: DreamConfig, is_norm: bool) -> nn.Module:
    return nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) if is_norm else nn.Identity()
