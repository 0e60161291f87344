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
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import ModelOutput

from ..attention import Angles
from ..llama_layer import DrafterLayer, norm_of
from ..published_model import PublishedModel
from ..rotary import angles_at, planes_of_channels
from ..visibility import Visibility, visibility_of
from .configuration import EagleConfig
from .pictures import NO_PICTURES, ImageAdaptor, Pictures


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


class EagleMixingLayer(DrafterLayer):
    """The first layer of EAGLE-3: attention reads an embedding and a feature side by side (arXiv 2503.01840, figure 5)."""

    def __init__(self, config: EagleConfig, layer_idx: int):
        super().__init__(config, layer_idx, has_input_norm=True, width=2)
        self.hidden_norm = norm_of(config, config.hidden_size)
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


class EaglePreTrainedModel(PublishedModel):
    """Loading, saving and initialisation of EAGLE models."""

    config_class = EagleConfig
    config: EagleConfig
    main_input_name = "inputs_embeds"
    _no_split_modules = ["DrafterLayer", "EagleMixingLayer"]


class EagleModel(EaglePreTrainedModel):
    """Layers, norms and projections of an EAGLE drafter."""

    draft_token_ids: torch.Tensor | None  # (draft_vocab_size,), or None for all tokens

    def __init__(self, config: EagleConfig):
        super().__init__(config)
        width, is_first = config.hidden_size, config.generation == 1
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if config.has_embedding else None
        self.input_norm = norm_of(config, config.feature_size, config.norm_before_fc)
        num_norms = len(config.feature_layers) if config.has_fc_norm else 0
        self.fc_norm = nn.ModuleList(norm_of(config, config.target_hidden_size) for _ in range(num_norms))  # type: ignore[arg-type]
        self.fc = nn.Linear(2 * width if is_first else config.feature_size, width, bias=config.fc_bias)
        has_adaptor = config.num_image_queries > 0
        self.image_adaptor = ImageAdaptor(config) if has_adaptor else None
        self.image_fc = nn.Linear(2 * width, width, bias=config.fc_bias) if has_adaptor else None
        self.layers = nn.ModuleList(_make_layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm_of(config, width, config.has_final_norm)
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


def _make_layer(config: EagleConfig, layer_idx: int) -> DrafterLayer:
    if config.generation == 3 and layer_idx == 0:
        return EagleMixingLayer(config, layer_idx)
    return DrafterLayer(config, layer_idx, has_input_norm=config.generation == 3 or config.has_input_norm)
