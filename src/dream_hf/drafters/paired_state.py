"""What a drafter whose rows are pairs (EAGLE, MTP) has read of a text, and the levels of a tree below it.

A row stands for a feature of the target's and the token chosen from it. Verified rows keep their slots in the cache; while a
tree grows, its beams sit in the tentative slots behind them, and a beam sees of those only its ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers.cache_utils import Cache

from ..runtime.counts import Counts
from ..runtime.kv_cache import slot_cache
from ..runtime.phases import DRAFTER, phase
from ..runtime.slots import Slots
from ..runtime.threads import cpu_threads
from .levels import SlotLevel, TargetHead, first_level, next_level
from .masked_attention import MASK_ENTRIES, aligned_bias
from .visibility import Biased, FromStart, Visibility, bias_of


class Part(Protocol):
    """What some drafters read of pictures beside embeddings and features, row by row."""

    def part(self, part: slice) -> Any:
        """The same of some of the rows."""


class PairedModel(Protocol):
    """A drafter whose rows are pairs, with T new rows of width H."""

    layers: nn.ModuleList

    @property
    def device(self) -> torch.device:
        """Where it reads."""

    @property
    def dtype(self) -> torch.dtype:
        """What it reads in."""

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """What a row reads of the target's features, (B, T, feature_size) -> (B, T, H)."""

    def __call__(
        self,
        inputs_embeds: torch.Tensor,  # (B, T, H)
        states: torch.Tensor,  # (B, T, H), fused features or, of drafted rows, what came out of their parents'
        attention_mask: Visibility,
        position_ids: torch.Tensor,  # (B, T) or (3, B, T)
        past_key_values: Cache,
        *pictures: Any,  # for those that read any
    ) -> Any:
        """An output whose `last_hidden_state` (B, T, H) stands in for the target's features of drafted tokens."""


class PairedState:
    """The state of a drafter whose rows are pairs.

    Args:
        drafter (`PairedModel`): The drafter; not changed.
        batch_size (`int`): Rows of the batch.
        draft_threads (`int`, *optional*): CPU threads that draft.
    """

    def __init__(self, drafter: PairedModel, batch_size: int, draft_threads: int | None = None):
        self.drafter, self.draft_threads = drafter, draft_threads
        self.slots = Slots([0] * batch_size)
        self.cache = slot_cache([self.slots] * len(drafter.layers))
        self.root_states: torch.Tensor | None = None  # (B, 1, H), what came out of the last verified row
        self.root_positions: torch.Tensor | None = None  # (B, 1)
        self.pictures: Part | None = None  # what text to come reads of those before it

    def read(
        self,
        embeds: torch.Tensor,  # (B, T, H)
        features: torch.Tensor,  # (B, T, feature_size)
        positions: torch.Tensor,  # (B, T) or (3, B, T)
        counts: Sequence[int],
        pictures: Part | None = None,
    ) -> torch.Tensor:
        """Take in verified rows, the first `counts[b]` of row b of the batch; returns what came out, (B, T, H)."""
        device, dtype = self.drafter.device, self.drafter.dtype
        embeds, positions = embeds.to(device, dtype), positions.to(device)
        is_prompt = not self.slots.longest  # many tokens: as many threads as there are
        with phase(DRAFTER), cpu_threads(None if is_prompt else self.draft_threads):
            states = self.drafter.fuse(features.to(device, dtype))
            if is_prompt:
                hidden = self._forward(embeds, states, FromStart(), positions, pictures)
            else:
                hidden = self._read_behind(embeds, states, positions, pictures)
        counts = Counts.of(counts)
        self.slots.commit(counts)
        last = counts.less(1).on(device)[:, None]
        root_states = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        root_positions = _highest(positions, counts)
        if self.root_states is not None and not all(
            counts
        ):  # a row of the batch that gained nothing stays where it is
            is_new = counts.on(device)[:, None] > 0
            root_states = torch.where(is_new[..., None], root_states, self.root_states)
            root_positions = torch.where(is_new, root_positions, self.root_positions)  # type: ignore[arg-type]
        self.root_states, self.root_positions = root_states, root_positions
        return hidden

    def read_on(self, embeds: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Take in rows of text right behind the last one: embeds (B, T, H), features (B, T, feature_size)."""
        assert self.root_positions is not None  # something has been read
        steps = torch.arange(1, embeds.shape[1] + 1, device=self.drafter.device)
        return self.read(embeds, features, self.root_positions + steps, counts, self.pictures)

    def beams(self, embeds: torch.Tensor, states: torch.Tensor, sees: torch.Tensor, depth: int) -> torch.Tensor:
        """Run one level's beams, tentatively: embeds and their parents' states (B, k, H) -> states (B, k, H).

        `sees` (B, k, columns) is 0 for rows that a beam sees, the verified ones, its ancestors' and its own, else -inf.
        """
        assert self.root_positions is not None  # something has been read
        positions = (self.root_positions + depth).expand(-1, embeds.shape[1])
        hidden = self._forward(embeds, states, _biased(sees), positions, self.pictures)
        self.slots.extend(embeds.shape[1])
        return hidden

    def _read_behind(
        self, embeds: torch.Tensor, states: torch.Tensor, positions: torch.Tensor, pictures: Part | None
    ) -> torch.Tensor:
        """Read on, in chunks whose masks do not grow with the text: (B, T, H)."""
        num_rows, num_new = embeds.shape[:2]
        starts = self.slots.tensor(embeds.device)[:, None]
        size = max(1, MASK_ENTRIES // (num_rows * (self.slots.end + num_new)))
        hidden = []
        for first in range(0, num_new, size):
            part = slice(first, min(first + size, num_new))
            own = starts + torch.arange(part.start, part.stop, device=embeds.device)
            columns = torch.arange(self.slots.end + part.stop - part.start, device=embeds.device)
            seen = _biased(bias_of(columns <= own[..., None], embeds.dtype))
            shown = None if pictures is None else pictures.part(part)
            read = embeds[:, part], states[:, part], seen, positions[..., part], shown
            hidden.append(self._forward(*read))
            self.slots.extend(part.stop - part.start)  # until all is read
        return torch.cat(hidden, dim=1)

    def _forward(
        self,
        embeds: torch.Tensor,
        states: torch.Tensor,
        seen: Visibility,
        positions: torch.Tensor,
        pictures: Part | None,
    ) -> torch.Tensor:
        more = () if pictures is None else (pictures,)
        return self.drafter(embeds, states, seen, positions, self.cache, *more).last_hidden_state


@dataclass(frozen=True)
class PairedLevels:
    """The levels of a tree below the last row that a drafter has read; what `grow_tree` grows from.

    Args:
        state (`PairedState`): A state that has read all verified text; its tentative slots are empty between two trees.
        head (`TargetHead`): Embedding and head, the drafter's own or the target's.
    """

    state: PairedState
    head: TargetHead

    def first_level(self, num_levels: int, top_k: int) -> SlotLevel:
        """The likeliest tokens below the last one of each row of the batch."""
        state = self.state
        assert state.root_states is not None  # something has been read
        num_columns = state.slots.end + num_levels * top_k
        with phase(DRAFTER):
            return first_level(
                self.head, state.root_states, state.slots.tensor(state.drafter.device), num_columns, top_k
            )

    def next_level(self, level: SlotLevel, places: list[int], depth: int, top_k: int) -> SlotLevel:
        """Run the best nodes of a level at `places`, tentatively, and find `top_k` children of each."""
        beams = level.beams(places)
        with phase(DRAFTER):
            embeds = self.head.embed(beams.tokens).to(beams.features.device, beams.features.dtype)
            return next_level(self.head, beams, self.state.beams(embeds, beams.features, beams.sees, depth), top_k)

    def forget_levels(self) -> None:
        """Empty the tentative slots."""
        self.state.slots.rollback()


def _biased(sees: torch.Tensor) -> Biased:
    """What rows see by a [`bias_of`] columns, (B, T, columns), in which each sees itself."""
    return Biased(aligned_bias(sees.unsqueeze(1)))


def _highest(positions: torch.Tensor, counts: Counts) -> torch.Tensor:
    """The highest position, on any plane, of the first `counts[b]` rows of each text: (B, 1)."""
    places = torch.arange(positions.shape[-1], device=positions.device)
    is_read = places < counts.on(positions.device)[:, None]
    positions = positions.expand(len(counts), -1) if positions.ndim == 2 else positions.amax(0)
    return positions.masked_fill(~is_read, -1).amax(-1, keepdim=True)
