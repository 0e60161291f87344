"""EAGLE's arithmetic: features and embeddings in, features out, of which the next level is drafted.

Row p of a text pairs the target's feature of token p with the embedding of token p + 1, which was chosen from it; what comes
out tells token p + 2. A drafted row has what came out of its parent's row instead of the target's feature. What rows read of
pictures is in `pictures.py`. B rows of a batch, T new rows, H `hidden_size`, k `feature_layers`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from ..attention import Angles, attend, remembered, rotated, split_heads
from ..pretrained import StrictPreTrainedModel
from ..visibility import Visibility, visibility_of
from .configuration import EagleConfig
from .pictures import NO_PICTURES, ImageAdaptor, Pictures
from .rotary import angles_at, planes_of_channels


@dataclass
class EagleOutput(ModelOutput):
    """Output of a drafter's forward.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, T, H)`): What stands in for the target's features of drafted
            tokens; [`EagleModel.logits`] turns it into logits.
        cache (`Cache`, *optional*): The cache passed in, extended.
    """

    last_hidden_state: torch.FloatTensor | None = None
    cache: Cache | None = None


class EagleAttention(LlamaAttention):
    """Llama's attention with inputs of any width, told who sees what; with norms of queries and keys as Qwen3's."""

    def __init__(self, config: EagleConfig, layer_idx: int, input_size: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        query_size, key_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))  # type: ignore[operator]
        self.q_proj = nn.Linear(input_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(input_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.q_norm = _norm(config, self.head_dim, config.has_qk_norm)
        self.k_norm = _norm(config, self.head_dim, config.has_qk_norm)

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
        keys = rotated(self.k_norm(split_heads(self.k_proj(hidden_states), self)), angles)
        values = split_heads(self.v_proj(hidden_states), self)
        keys, values = remembered(keys, values, seen, cache, self.layer_idx)  # type: ignore[arg-type]
        return self.o_proj(attend(self, queries, keys, values, seen).flatten(2))


class EagleLayer(nn.Module):
    """Llama's layer, with or without an input norm."""

    def __init__(self, config: EagleConfig, layer_idx: int, has_input_norm: bool, width: int = 1):
        super().__init__()
        self.self_attn = EagleAttention(config, layer_idx, width * config.hidden_size)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = _norm(config, config.hidden_size, has_input_norm)
        self.post_attention_layernorm = _norm(config, config.hidden_size)

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


class EagleMixingLayer(EagleLayer):
    """The first layer of EAGLE-3: attention reads an embedding and a feature side by side (arXiv 2503.01840, figure 5)."""

    def __init__(self, config: EagleConfig, layer_idx: int):
        super().__init__(config, layer_idx, has_input_norm=True, width=2)
        self.hidden_norm = _norm(config, config.hidden_size)
        self.norm_before_residual = config.norm_before_residual

    def forward(  # type: ignore[override]
        self,
        embeds: torch.Tensor,  # (B, T, H)
        states: torch.Tensor,  # (B, T, H)
        seen: Visibility,
        angles: Angles,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        normed = self.hidden_norm(states)
        hidden = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        return self.attended(normed if self.norm_before_residual else states, hidden, seen, angles, cache)


class EaglePreTrainedModel(StrictPreTrainedModel):
    """Loading, saving and initialisation of EAGLE models."""

    config_class = EagleConfig
    config: EagleConfig
    base_model_prefix = ""
    main_input_name = "inputs_embeds"
    input_modalities = ["text"]
    _no_split_modules = ["EagleLayer", "EagleMixingLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_attention_backend = True

    # Transformers' own: the cards and the code that are saved beside other drafters are DREAM's.
    save_pretrained = PreTrainedModel.save_pretrained  # type: ignore[assignment]
    push_to_hub = PreTrainedModel.push_to_hub  # type: ignore[assignment]


class EagleModel(EaglePreTrainedModel):
    """Layers, norms and projections of an EAGLE drafter."""

    draft_token_ids: torch.Tensor | None  # (draft_vocab_size,), or None for all tokens

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        width, is_first = config.hidden_size, config.generation == 1
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if config.has_embedding else None
        self.input_norm = _norm(config, config.feature_size, config.norm_before_fc)
        num_norms = len(config.feature_layers) if config.has_fc_norm else 0
        self.fc_norm = nn.ModuleList(_norm(config, config.target_hidden_size) for _ in range(num_norms))  # type: ignore[arg-type]
        self.fc = nn.Linear(2 * width if is_first else config.feature_size, width, bias=config.fc_bias)
        has_adaptor = config.num_image_queries > 0
        self.image_adaptor = ImageAdaptor(config) if has_adaptor else None
        self.image_fc = nn.Linear(2 * width, width, bias=config.fc_bias) if has_adaptor else None
        self.layers = nn.ModuleList(_make_layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = _norm(config, width, config.has_final_norm)
        num_drafted = config.draft_vocab_size  # which tokens these are comes with the checkpoint
        self.lm_head = nn.Linear(width, num_drafted or config.vocab_size, bias=False) if config.has_head else None
        self.register_buffer("draft_token_ids", None if num_drafted is None else torch.full((num_drafted,), -1))
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.post_init()

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """What a row reads of the target's features, (B, T, k * target_hidden_size) -> (B, T, H)."""
        if self.config.generation == 1:
            return features
        if self.fc_norm:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(self.input_norm(features))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        states: torch.Tensor,
        attention_mask: torch.Tensor | Visibility | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        pictures: Pictures = NO_PICTURES,
        is_fused: bool = True,
    ) -> EagleOutput:
        """Run T new rows behind those in the cache.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(B, T, H)`): Embeddings of the tokens that the rows read.
            states (`torch.Tensor` of shape `(B, T, H)`): Fused features of the tokens before them or, for drafted rows,
                what came out of their parents' rows.
            attention_mask (`torch.Tensor` of shape `(B, T, K)` or `Visibility`, *optional*): Which rows each sees, those in
                the cache included; by default all before it and itself.
            position_ids (`torch.Tensor` of shape `(B, T)` or `(3, B, T)`, *optional*): By default rows are counted.
            past_key_values (`Cache`, *optional*): Extended in place.
            pictures (`Pictures`): Which rows enter the layers as they are, and what text reads of pictures before it.
            is_fused (`bool`): False where `states` are features as the target made them, see [`EagleModel.fuse`].

        Returns:
            `EagleOutput`
        """
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows = torch.arange(num_past, num_past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        seen = visibility_of(attention_mask, rows)
        states = states if is_fused else self.fuse(states)
        angles = self.angles(rows if position_ids is None else position_ids, inputs_embeds)
        if self.config.generation == 1:
            hidden = self.mixed(inputs_embeds, states, pictures)
            hidden = self.layers[0](hidden, seen, angles, past_key_values)
        else:
            hidden = self.layers[0](inputs_embeds, states, seen, angles, past_key_values)
        for layer in self.layers[1:]:
            hidden = layer(hidden, seen, angles, past_key_values)
        last = self.norm(hidden) if self.config.is_feedback_normed else hidden
        return EagleOutput(last_hidden_state=last, cache=past_key_values)  # type: ignore[arg-type]

    def mixed(self, embeds: torch.Tensor, states: torch.Tensor, pictures: Pictures) -> torch.Tensor:
        """What enters the first layer of `generation` 1, of embeddings and states (B, T, H) each: (B, T, H)."""
        if self.image_fc is not None:
            context = torch.zeros_like(states) if pictures.context is None else pictures.context.expand_as(states)
            states = self.image_fc(torch.cat([states, context], dim=-1))
        hidden = self.fc(torch.cat([embeds, states], dim=-1))
        return hidden if pictures.rows is None else torch.where(pictures.rows[..., None], embeds, hidden)

    def for_head(self, states: torch.Tensor) -> torch.Tensor:
        """What a head reads of the states that come out, (B, T, H)."""
        return states if self.config.is_feedback_normed else self.norm(states)

    def angles(self, positions: torch.Tensor, like: torch.Tensor) -> Angles:
        """Rotary angles at positions (B, T) or (3, B, T)."""
        section = self.config.mrope_section
        planes = None if section is None else planes_of_channels(section, self.config.is_mrope_interleaved)
        return angles_at(positions, self.rotary_emb.inv_freq, self.rotary_emb.attention_scaling, planes, like)


def _make_layer(config: EagleConfig, layer_idx: int) -> EagleLayer:
    if config.generation == 3 and layer_idx == 0:
        return EagleMixingLayer(config, layer_idx)
    return EagleLayer(config, layer_idx, has_input_norm=config.generation == 3 or config.has_input_norm)


def _norm(config: EagleConfig, size: int, is_norm: bool = True) -> nn.Module:
    return nn.RMSNorm(size, eps=config.rms_norm_eps) if is_norm else nn.Identity()
