"""The arithmetic of a multi-token prediction head (MTP), with the layer of its target's family.

Row p of a text pairs the target's feature of token p, after the final norm, with the embedding of token p + 1, which was chosen
from it; what comes out tells token p + 2. A drafted row has what came out of its parent's row instead of the target's feature.
B rows of a batch, T new rows, H width of the target.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutput

from ...compat import CACHE
from ...targets.attending_layer import AttendingLayer, angles_of
from ..visibility import Visibility, visibility_of


class MTPModel(nn.Module):
    """Norms, projection and layer of an MTP head, by the names that checkpoints have for them.

    Args:
        parts (`AttendingLayer`): What the layer is made of; it has to look its attention up as `SEEN`.
    """

    draft_token_ids: torch.Tensor | None  # (R,), or None for all tokens

    def __init__(self, parts: AttendingLayer):
        super().__init__()
        self.config: Any = parts.config
        size, eps = self.config.hidden_size, self.config.rms_norm_eps
        self.pre_fc_norm_embedding = parts.norm(size, eps=eps)
        self.pre_fc_norm_hidden = parts.norm(size, eps=eps)
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layers = nn.ModuleList([parts.layer(self.config, 0)])
        self.norm = parts.norm(size, eps=eps)
        self.rotary_emb, self.has_planes = parts.rotary, parts.has_planes
        self.embed_tokens = self.lm_head = None  # which are the target's
        self.register_buffer("draft_token_ids", None, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.fc.weight.dtype

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """What a row reads of the target's features, (B, T, H): the features."""
        return features

    def for_head(self, states: torch.Tensor) -> torch.Tensor:
        """What the target's head reads of the states that come out, (B, T, H): the states, which are normed."""
        return states

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        states: torch.Tensor,
        attention_mask: torch.Tensor | Visibility | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> BaseModelOutput:
        """Run T new rows behind those in the cache: z = norm(layer(fc([norm_e(embedding); norm_h(state)]))).

        Args:
            inputs_embeds (`torch.Tensor` of shape `(B, T, H)`): Embeddings of the tokens that the rows read.
            states (`torch.Tensor` of shape `(B, T, H)`): Features of the tokens before them or, for drafted rows, what came out
                of their parents' rows.
            attention_mask (`torch.Tensor` of shape `(B, T, K)` or `Visibility`, *optional*): Which rows each sees, those in
                the cache included; by default all before it and itself.
            position_ids (`torch.Tensor` of shape `(B, T)` or `(3, B, T)`, *optional*): By default rows are counted.
            past_key_values (`Cache`, *optional*): Extended in place.

        Returns:
            `BaseModelOutput`: z, (B, T, H), which the target's head and the next level read.
        """
        num_past = 0 if past_key_values is None else past_key_values.get_seq_length()
        rows = torch.arange(num_past, num_past + inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        hidden = self.fc(
            torch.cat([self.pre_fc_norm_embedding(inputs_embeds), self.pre_fc_norm_hidden(states)], dim=-1)
        )
        positions = rows if position_ids is None else position_ids
        arguments: dict[str, Any] = {
            "position_embeddings": angles_of(self.rotary_emb, positions, hidden, self.has_planes),
            "attention_mask": visibility_of(attention_mask, rows),
            CACHE: past_key_values,
        }
        return BaseModelOutput(last_hidden_state=self.norm(self.layers[0](hidden, **arguments)))
