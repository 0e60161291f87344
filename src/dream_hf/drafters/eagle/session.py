"""An EAGLE drafter at work in one `generate()`: what it has read, what it has yet to read, and the trees it grows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ...decoding.drafter import Prefill
from ...decoding.settings import DraftSettings
from ...runtime.alignment import left_aligned
from ..lazy_session import LazySession
from ..levels import TargetHead
from ..pending import PendingTokens
from .modeling import EagleModel
from .pictures import Pictures, compressed
from .state import EagleLevels, EagleState


class EagleSession(LazySession):
    """Reads lazily, see [`LazySession`].

    Args:
        drafter (`EagleModel`): The drafter; not changed.
        prefill (`Prefill`): What the target has read, with features.
        settings (`DraftSettings`): How to draft.
    """

    def __init__(self, drafter: EagleModel, prefill: Prefill, settings: DraftSettings):
        self.drafter, self.settings = drafter, settings
        self.head = head_for(drafter, prefill)
        self.state, self.pending = self._start_state(prefill)
        self._read_prompt(prefill)

    def levels(self) -> EagleLevels:
        self._catch_up()
        return EagleLevels(self.state, self.head)

    def _start_state(self, prefill: Prefill) -> tuple[EagleState, PendingTokens]:
        """An empty state, or that of an earlier turn brought up to date."""
        if isinstance(prefill.earlier, EagleSession) and prefill.earlier.drafter is self.drafter:
            self.state, self.pending = prefill.earlier.state, prefill.earlier.pending
            self.state.draft_threads = self.settings.draft_threads
            self.state.leave_inference_mode()
            self._catch_up()
            return self.state, self.pending
        batch_size = prefill.first_tokens.shape[0]
        return EagleState(self.drafter, batch_size, self.settings.draft_threads), PendingTokens()

    def _read_prompt(self, prefill: Prefill) -> None:
        """Read the prompt, each feature with the token behind it; the first new token is behind the last feature.

        A drafter that goes on has read the first of these tokens with the feature before it, so nothing is left out. Of a
        prompt that came as embeddings no tokens are known, so only the last feature is read.
        """
        assert prefill.features is not None  # the drafter needs them
        num_new = min(prefill.features.shape[1], prefill.token_ids.shape[1] + 1)
        features, device = prefill.features[:, -num_new:], prefill.features.device
        real = prefill.real.to(device)
        order, counts = left_aligned(real[:, -num_new:])
        tokens = torch.cat([prefill.token_ids, prefill.first_tokens.to(prefill.token_ids)], dim=1).to(device)
        # The last of these is behind the last slot; behind a slot that padding follows is the next real one.
        behind = order[:, 1:] - 1
        behind = nn.functional.pad(behind, (0, 1)).scatter(1, counts.clamp(min=1)[:, None] - 1, num_new - 1)
        positions = prefill.positions
        if positions is None or self.drafter.config.mrope_section is None:
            positions = real.cumsum(-1) - 1
        positions = positions[..., -num_new:].to(device)
        positions = positions.expand(*positions.shape[:-2], *order.shape)
        positions = positions.gather(-1, order.expand_as(positions))
        features = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
        behind = behind.clamp(min=0)
        embeds = self.head.embed(tokens[:, -num_new:].gather(1, behind))
        if self.drafter.config.image_rows == "token":
            self.state.read(embeds, features, positions, counts.tolist())
        else:
            embeds, is_image = _with_pictures(prefill, embeds, behind, counts)
            self._read_with_pictures(embeds, features, positions, counts, is_image)

    def _read_with_pictures(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        is_image: torch.Tensor,
    ) -> None:
        """Read rows with pictures merged, the first `counts` (B,) of each text, as `image_rows` says."""
        drafter, state = self.drafter, self.state
        if drafter.config.image_rows != "compressed":
            pictures = Pictures(is_image.to(drafter.device)) if drafter.config.image_rows == "direct" else Pictures()
            state.read(embeds, features, positions, counts.tolist(), pictures)
            return
        assert drafter.image_adaptor is not None  # its config was checked
        embeds, is_image = embeds.to(drafter.device, drafter.dtype), is_image.to(drafter.device)
        before = embeds.new_zeros(len(embeds), 1, embeds.shape[-1]) if state.context is None else state.context
        rows = compressed(drafter.image_adaptor, embeds, is_image, before)
        # What is left moves together; every row of text keeps its position.
        places = torch.arange(embeds.shape[1], device=drafter.device)
        order, num_kept = left_aligned(rows.is_kept & (places < counts.to(drafter.device)[:, None]))
        order = order[:, : int(num_kept.max())]
        wide = order[..., None].expand(-1, -1, embeds.shape[-1])
        pictures = Pictures(is_image.gather(1, order), rows.context.gather(1, wide))
        state.context = rows.context[:, -1:]  # of text to come
        features, positions = features.gather(1, wide.to(features.device)), positions.to(order.device).gather(1, order)
        state.read(rows.embeds.gather(1, wide), features, positions, num_kept.tolist(), pictures)


def _with_pictures(
    prefill: Prefill, embeds: torch.Tensor, behind: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings that rows read, (B, T, H), with pictures merged; True at image rows, (B, T).

    `behind` (B, T) are the places of the tokens that rows read, among the last T of the prompt and the first new one.
    """
    assert prefill.embeds is not None  # the drafter needs them
    num_new, device = behind.shape[1], embeds.device
    behind = behind.to(device)
    is_image = nn.functional.pad(prefill.is_visual.to(device), (0, 1))[:, -num_new:].gather(1, behind)
    is_image &= torch.arange(num_new, device=device) < counts.to(device)[:, None]
    merged = nn.functional.pad(prefill.embeds, (0, 0, 0, 1))[:, -num_new:].to(device, embeds.dtype)
    merged = merged.gather(1, behind[..., None].expand_as(merged))
    return torch.where(is_image[..., None], merged, embeds), is_image


def head_for(drafter: EagleModel, prefill: Prefill) -> TargetHead:
    """Embedding and head, the drafter's own or the target's; they are asked for tokens and states from anywhere."""
    assert prefill.features is not None  # the drafter needs them
    embed = partial(_embed, drafter.embed_tokens or prefill.target.embedding)
    if drafter.lm_head is not None:
        logits = partial(_own_logits, drafter)
    else:
        logits = partial(_target_logits, drafter, prefill.target.draft_logits(drafter), prefill.features)
    return TargetHead(embed=embed, logits=logits, token_ids=drafter.draft_token_ids, ends=prefill.end_ids)


def _embed(table: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of tokens; what stands for a picture may lie outside of a table, where the target merges it."""
    weight = table.weight
    token_ids = token_ids.to(weight.device)
    return table(token_ids.masked_fill(token_ids >= weight.shape[0], 0))


def _own_logits(drafter: EagleModel, states: torch.Tensor) -> torch.Tensor:
    return drafter.lm_head(drafter.for_head(states)).float()  # type: ignore[misc]


def _target_logits(drafter: EagleModel, logits: Any, like: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return logits(drafter.for_head(states).to(like.device, like.dtype))
