"""A drafter whose rows are pairs (EAGLE, MTP) at work in one `generate()`: what it has read, has yet to read, and its trees."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ..decoding.drafter import Prefill
from ..decoding.settings import DraftSettings
from ..runtime.alignment import left_aligned
from ..runtime.kv_cache import leave_inference_mode
from .lazy_session import LazySession
from .levels import TargetHead
from .paired_state import PairedLevels, PairedState
from .pending import PendingTokens


class PairedSession(LazySession):
    """Reads lazily, see [`LazySession`].

    Args:
        drafter (`Drafter`): A [`PairedModel`]; not changed. Where its `needs` name positions it stands at the target's, else it
            counts tokens; where they name embeddings it reads those of pictures as they entered the target.
        prefill (`Prefill`): What the target has read, with features.
        settings (`DraftSettings`): How to draft.
    """

    def __init__(self, drafter: Any, prefill: Prefill, settings: DraftSettings):
        self.drafter, self.settings = drafter, settings
        self.head = head_for(drafter, prefill)
        self.state, self.pending = self._start_state(prefill)
        self._read_prompt(prefill)

    def levels(self) -> PairedLevels:
        self._catch_up()
        return PairedLevels(self.state, self.head)

    def _start_state(self, prefill: Prefill) -> tuple[PairedState, PendingTokens]:
        """An empty state, or that of an earlier turn brought up to date."""
        if isinstance(prefill.earlier, PairedSession) and prefill.earlier.drafter is self.drafter:
            self.state, self.pending = prefill.earlier.state, prefill.earlier.pending
            self.state.draft_threads = self.settings.draft_threads
            leave_inference_mode(self.state.cache)
            self._catch_up()
            return self.state, self.pending
        batch_size = prefill.first_tokens.shape[0]
        return PairedState(self.drafter, batch_size, self.settings.draft_threads), PendingTokens()

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
        if positions is None or not self.drafter.needs.positions:
            positions = real.cumsum(-1) - 1
        features = features.gather(1, order[..., None].expand(-1, -1, features.shape[-1]))
        behind = behind.clamp(min=0)
        positions = positions[..., -num_new:].to(device)
        positions = self._stand(positions.expand(*positions.shape[:-2], *order.shape), order, behind)
        embeds = self.head.embed(tokens[:, -num_new:].gather(1, behind))
        if self.drafter.needs.embeds:
            embeds, is_image = _with_pictures(prefill, embeds, behind, counts)
            self._read_with_pictures(embeds, features, positions, counts, is_image)
        else:
            self.state.read(embeds, features, positions, counts.tolist())

    def _stand(self, positions: torch.Tensor, order: torch.Tensor, behind: torch.Tensor) -> torch.Tensor:
        """Where rows stand, (B, T) or (3, B, T): by default where their features do.

        Args:
            positions (`torch.LongTensor` of shape `(B, T)` or `(3, B, T)`): Of the last T tokens that have features.
            order, behind (`torch.LongTensor` of shape `(B, T)`): The places of the rows' features among these, and of the
                tokens that rows read among the ones that come one later.
        """
        return positions.gather(-1, order.expand_as(positions))

    def _read_with_pictures(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        counts: torch.Tensor,
        is_image: torch.Tensor,
    ) -> None:
        """Read rows with pictures merged, the first `counts` (B,) of each text; `is_image` (B, T) is True where they are."""
        self.state.read(embeds, features, positions, counts.tolist())


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


def head_for(drafter: Any, prefill: Prefill) -> TargetHead:
    """Embedding and head, the drafter's own or the target's; they are asked for tokens and states from anywhere."""
    assert prefill.features is not None  # the drafter needs them
    embed = partial(embed_from, drafter.embed_tokens or prefill.target.embedding)
    if drafter.lm_head is not None:
        logits = partial(_own_logits, drafter)
    else:
        logits = partial(_target_logits, drafter, prefill.target.draft_logits(drafter), prefill.features)
    return TargetHead(embed=embed, logits=logits, token_ids=drafter.draft_token_ids, ends=prefill.end_ids)


def embed_from(table: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of tokens; what stands for a picture may lie outside of a table, where the target merges it."""
    weight = table.weight
    token_ids = token_ids.to(weight.device)
    return table(token_ids.masked_fill(token_ids >= weight.shape[0], 0))


def _own_logits(drafter: Any, states: torch.Tensor) -> torch.Tensor:
    return drafter.lm_head(drafter.for_head(states)).float()


def _target_logits(drafter: Any, logits: Any, like: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return logits(drafter.for_head(states).to(like.device, like.dtype))
