"""DFlash's arithmetic: features of a text and a block of masks in, states of the block's rows out, in one forward.

A block is the last token of a text and masks behind it. Its rows see each other and the context: a row for each token before
them, made of the target's features by `fc` and a norm. All layers attend to the same context and leave it as it is, so that its
keys and values can be kept. Positions are one-dimensional: row p of the context stands at p, the block right behind it. B rows
of a batch, L tokens of context, T rows of a block, H `hidden_size`, k `feature_layers`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..attention import Angles
from ..llama_layer import DrafterLayer, norm_of
from ..masked_attention import aligned_bias
from ..published_model import PublishedModel
from ..rotary import angles_at
from ..visibility import Biased, bias_of
from .configuration import DFlashConfig


class Sight(NamedTuple):
    """How far rows of a block see in a layer.

    Args:
        window (`int`, *optional*): Tokens that they see, themselves included; all by default.
        is_causal (`bool`): Whether they see no row of the block behind themselves.
        is_anchored (`bool`): Whether the window counts back from the first row of the block, for all of them.
    """

    window: int | None
    is_causal: bool
    is_anchored: bool


def visible_to_block(lengths: torch.Tensor, block_size: int, num_columns: int, sight: Sight) -> torch.Tensor:
    """Which columns rows of a block see, (B, T, columns): column c is token c, and the block begins behind `lengths` (B,) of
    them, whatever comes behind the block."""
    columns = torch.arange(num_columns, device=lengths.device)
    starts = lengths[:, None, None]
    own = starts + torch.arange(block_size, device=lengths.device)[:, None]  # (B, T, 1)
    visible = columns <= own if sight.is_causal else (columns < starts + block_size).expand(-1, block_size, -1)
    if sight.window is None:
        return visible
    if sight.is_anchored:
        return visible & (columns >= starts - sight.window)
    return visible & ((columns - own).abs() < sight.window)


class DFlashPreTrainedModel(PublishedModel):
    """Loading, saving and initialisation of DFlash models."""

    config_class = DFlashConfig
    config: DFlashConfig
    main_input_name = "inputs_embeds"
    _no_split_modules = ["DrafterLayer"]


class DFlashModel(DFlashPreTrainedModel):
    """Layers, norms and projections of a DFlash drafter."""

    draft_token_ids: torch.Tensor | None  # (draft_vocab_size,), or None for all tokens

    def __init__(self, config: DFlashConfig):
        super().__init__(config)
        width, num_drafted = config.hidden_size, config.draft_vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if config.has_embedding else None
        self.fc = nn.Linear(config.feature_size, width, bias=config.fc_bias)
        self.hidden_norm = norm_of(config, width)
        self.layers = nn.ModuleList(DrafterLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = norm_of(config, width)
        self.lm_head = nn.Linear(width, num_drafted or config.vocab_size, bias=False) if config.has_head else None
        self.register_buffer("draft_token_ids", None if num_drafted is None else torch.full((num_drafted,), -1))
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.post_init()

    def context(self, features: torch.Tensor) -> torch.Tensor:
        """What layers attend to of the target's features, (B, L, k * target_hidden_size) -> (B, L, H)."""
        return self.hidden_norm(self.fc(features))

    def remember(self, context: torch.Tensor, position_ids: torch.Tensor, past_key_values: Cache) -> None:
        """Put keys and values of new context (B, L, H) at positions (B, L) into a cache."""
        angles = self.angles(position_ids, context)
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            past_key_values.update(*layer.self_attn.keys_and_values(context, angles), index)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Run a block behind the context in a cache.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(B, T, H)`): Embeddings of the last token and of masks.
            past_key_values (`Cache`): Holds the context. Keys and values of the block are written behind it.
            lengths (`torch.LongTensor` of shape `(B,)`): How much context each row has; the block is written right behind it.

        Returns:
            `torch.Tensor` of shape `(B, T, H)`: What came out of the last layer; [`DFlashModel.for_head`] makes of it what a
            head reads.
        """
        block_size = inputs_embeds.shape[1]
        angles = self.angles(lengths[:, None] + torch.arange(block_size, device=lengths.device), inputs_embeds)
        num_columns = int(past_key_values.get_seq_length()) + block_size
        sights = [self.sight(index) for index in range(len(self.layers))]
        seen = {
            sight: _shown(visible_to_block(lengths, block_size, num_columns, sight), inputs_embeds.dtype)
            for sight in set(sights)
        }
        hidden = inputs_embeds
        for layer, sight in zip(self.layers, sights, strict=True):
            hidden = layer(hidden, seen[sight], angles, past_key_values)
        return hidden

    def for_head(self, states: torch.Tensor) -> torch.Tensor:
        """What a head reads of the states that come out, (B, T, H)."""
        return self.norm(states)

    def sight(self, layer_idx: int) -> Sight:
        """How far rows of a block see in a layer."""
        config = self.config
        window = config.sliding_window if layer_idx in config.sliding_layers else None
        return Sight(window, layer_idx in config.causal_layers, window is not None and config.is_window_anchored)

    def angles(self, positions: torch.Tensor, like: torch.Tensor) -> Angles:
        """Rotary angles at positions (B, T)."""
        return angles_at(positions, self.rotary_emb.inv_freq, self.rotary_emb.attention_scaling, None, like)


def _shown(visible: torch.Tensor, dtype: torch.dtype) -> Biased:
    return Biased(aligned_bias(bias_of(visible, dtype).unsqueeze(1)))
