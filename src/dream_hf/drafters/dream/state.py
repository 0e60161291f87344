"""A drafter in mid-decoding: its caches, where each row stands, and its forwards over verified text and over beams.

B rows, k beams per level, H width. The caches hold the verified tokens and features; while a tree grows, its beams sit in the
tentative slots behind them, and a beam sees of those only its own ancestors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from ...decoding.settings import DraftSettings
from ...runtime import crossings
from ...runtime.compilation import Settings as CompileSettings
from ...runtime.counts import Counts
from ...runtime.kv_cache import SlotLayer, capacity_for, few_sizes, slot_cache
from ...runtime.leases import lease_for_life
from ...runtime.phases import DRAFTER, phase
from ...runtime.slots import Slots
from ...runtime.threads import cpu_threads
from ..levels import SlotLevel, TargetHead, first_level, next_level
from ..masked_attention import MASK_ENTRIES
from ..visibility import FromStart, Visibilities, bias_of, shown_columns
from .compiled import CompiledLevels, WholeDraft
from .compression import DrafterText
from .functional import decoding_forward, is_plain_throughout
from .modeling import DreamModel


class DrafterState:
    """The state of a drafter.

    A row's features are one fewer than its tokens: the last token has not been through the target. Feature slot s holds
    what produced the token in slot s + 1, so whoever sees that token sees that feature, and one mask serves both.

    Args:
        drafter (`DreamModel`): The drafter; not changed.
        batch_size (`int`): Rows.
        settings (`DraftSettings`, *optional*): How to draft; by default as the drafter's config says.
        compilation (`CompileSettings`, *optional*): How to compile its levels, if its forward is all plain functions.
        num_slots (`int`): Tokens of a row that there is room for to start with, if its levels are compiled.
    """

    def __init__(
        self,
        drafter: DreamModel,
        batch_size: int,
        settings: DraftSettings | None = None,
        compilation: CompileSettings | None = None,
        num_slots: int = 0,
    ):
        self.drafter = drafter
        self.settings = settings or DraftSettings.of(drafter.config)
        self.forward = decoding_forward(drafter)
        self.compiled: CompiledLevels | None = None
        self.whole_draft: WholeDraft | None = None
        lease = None
        if compilation is not None and is_plain_throughout(drafter):
            self.compiled = CompiledLevels(drafter, compilation)
            lease = lease_for_life(self, drafter, batch_size, capacity_for(num_slots))
            if crossings.reads_wait(drafter.device):  # else levels are looked at, and fewer of them are cheaper
                self.whole_draft = WholeDraft(drafter, compilation, lease)
        self.tokens = Slots([0] * batch_size, lease=lease, name="tokens")
        self.features = Slots([0] * batch_size, lease=lease, name="features")
        self.cache = self._make_cache(batch_size)
        self.root_features: torch.Tensor | None = None  # (B, 1, H), the drafter's own for the last token
        self.root_positions: torch.Tensor | None = None  # (B, 1)
        self.level_places: list[Any] = []  # where the levels below the last token stand, as the forward takes it

    def read(
        self,
        embeds: torch.Tensor,  # (B, T, H)
        features: torch.Tensor,  # (B, S, H), S = T, or T - 1 at the start
        positions: torch.Tensor,  # (B, T)
        counts: Sequence[int],
    ) -> None:
        """Take in verified text: the first `counts[b]` tokens of row b, of which the last has no feature yet."""
        device, dtype = self.drafter.device, self.drafter.dtype
        embeds, features = embeds.to(device, dtype), features.to(device, dtype)
        positions = positions.to(device)
        num_missing = embeds.shape[1] - features.shape[1]
        is_prompt = not self.features.longest  # many tokens: as many threads as there are
        with phase(DRAFTER), cpu_threads(None if is_prompt else self.settings.draft_threads):
            if self.tokens.longest:
                hidden = self._read_behind(embeds, features, positions)
            else:
                hidden = self._read_start(embeds, features, positions)
        counts = Counts.of(counts)
        self.commit(counts, num_missing)
        last = counts.less(1).on(device)[:, None]
        self.root_features = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        self.root_positions = positions.gather(1, last)

    def _read_start(self, embeds: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read the start of all rows' texts at once, which takes no masks: features (B, T, H)."""
        self.reserve(embeds.shape[1])
        seen = Visibilities(FromStart(), FromStart(behind=1))
        return self._forward(embeds, features, seen, self.forward.places(embeds, positions))

    def _read_behind(self, embeds: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read on, in chunks whose masks do not grow with the text: features (B, T, H)."""
        num_rows, num_tokens = positions.shape
        columns = self.reserve(num_tokens)
        starts = self.tokens.tensor(embeds.device)[:, None]
        size = max(1, MASK_ENTRIES // (num_rows * columns))
        parts = [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
        hidden = []
        for part in parts:
            own = starts + torch.arange(part.start, part.stop, device=embeds.device)
            sees = torch.arange(self.reserve(part.stop - part.start), device=embeds.device) <= own[..., None]
            seen, places = shown_columns(bias_of(sees, embeds.dtype)), self.forward.places(embeds, positions[:, part])
            hidden.append(self._forward(embeds[:, part], features[:, part], seen, places))
            if len(parts) > 1:
                self.extend(part.stop - part.start)  # until all is read
        return hidden[0] if len(parts) == 1 else torch.cat(hidden, dim=1)

    def read_prompt(
        self, text: DrafterText, first: torch.Tensor, end: torch.Tensor, known: torch.Tensor | None = None
    ) -> None:
        """Take in a prompt, and the first token behind it.

        Args:
            text (`DrafterText`): What the drafter reads of the prompt.
            first (`torch.Tensor` of shape `(B, 1, H)`): Embedding of each row's first new token.
            end (`torch.LongTensor` of shape `(B, 1)`): Its position.
            known (`torch.Tensor` of shape `(B, 0 or 1, H)`, *optional*): Feature of the token before the text, if
                the drafter has read that token already.
        """
        embeds, positions = nn.functional.pad(text.embeds, (0, 0, 0, 1)), nn.functional.pad(text.positions, (0, 1))
        behind = text.counts[:, None]  # right behind each row's last kept token
        first = first.to(embeds.device, embeds.dtype)
        embeds.scatter_(1, behind[..., None].expand(-1, -1, embeds.shape[-1]), first)
        positions.scatter_(1, behind, end)
        features = text.features
        if known is not None and known.shape[1]:
            features = torch.cat([known, features], dim=1)
        counts = text.counts + 1
        self.read(embeds, features, positions, Counts(counts.tolist(), counts))

    def read_on(self, embeds: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Take in what came right after the last token: embeds and features (B, T, H), `counts[b]` tokens of row b."""
        assert self.root_positions is not None  # something has been read
        steps = torch.arange(1, embeds.shape[1] + 1, device=self.drafter.device)
        self.read(embeds, features, self.root_positions + steps, counts)

    def reserve(self, num_new: int) -> int:
        """Make room for `num_new` tentative slots; returns how many columns a mask over all slots has.

        Column c stands for token slot c and feature slot c - 1.
        """
        num_columns = max(self.tokens.end + num_new, self.features.end + num_new + 1)
        if self.compiled is None:
            return num_columns
        num_columns = few_sizes(num_columns, self.drafter.device)
        for layer in self._layers:
            layer.reserve(num_columns - layer.slots.end)
        if self.whole_draft is None:
            return num_columns
        return min(layer.keys.shape[2] for layer in self._layers)  # which changes less often than the text does

    def beams(self, embeds: torch.Tensor, features: torch.Tensor, sees: torch.Tensor, level: int) -> torch.Tensor:
        """Run one level's beams, tentatively: embeds (B, k, H), their parents' features (B, k, H) -> features (B, k, H).

        `sees` (B, k, columns) is 0 for slots that a beam sees, the verified ones, its ancestors' and its own, else -inf.
        """
        hidden = self._forward(embeds, features, shown_columns(sees), self._places_of(level, embeds))
        self.extend(embeds.shape[1])
        return hidden

    def next_level(self, head: TargetHead, level: SlotLevel, places: list[int], depth: int, top_k: int) -> SlotLevel:
        """Run the best nodes at `places` of a level, which are at a depth, tentatively, and find `top_k` children of each."""
        with phase(DRAFTER):
            if self.compiled is None:
                beams = level.beams(places)
                embeds = head.embed(beams.tokens).to(beams.features.device, beams.features.dtype)
                return next_level(head, beams, self.beams(embeds, beams.features, beams.sees, depth), top_k)
            beams = level.all_beams(places)  # of one shape, whatever the places
            level = self.compiled(self.forward, self.cache, head, beams, self._places_of(depth, beams.features), top_k)
        self.extend(beams.tokens.shape[1])
        return level

    def commit(self, counts: Counts, num_missing: int = 0) -> None:
        """Take note that `counts[b]` tokens of row b have been read, and features but for the last `num_missing`."""
        self.level_places = []
        self.tokens.commit(counts)
        self.features.commit(counts.less(num_missing))

    def extend(self, num_beams: int) -> None:
        """Take note that a level has been written to the tentative slots."""
        self.tokens.extend(num_beams)
        self.features.extend(num_beams)

    def limit(self, num_tokens: int | None) -> None:
        """Let buffers have no more room than for this many tokens in a row, beams included."""
        self.tokens.limit = self.features.limit = num_tokens

    def leave_inference_mode(self) -> None:
        """Let buffers made in `torch.inference_mode()` be written outside it."""
        if not torch.is_inference_mode_enabled():
            for layer in self._layers:
                layer.leave_inference_mode()

    def forget_beams(self) -> None:
        """Take the tentative slots back."""
        self.tokens.rollback()
        self.features.rollback()

    def _places_of(self, level: int, like: torch.Tensor) -> Any:
        """Where a level stands, all beams of which have one position; found for all levels together."""
        if level > len(self.level_places):
            assert self.root_positions is not None  # something has been read
            levels = torch.arange(1, max(level, self.settings.tree_depth) + 1, device=like.device)
            self.level_places = self.forward.places_of_levels(like, self.root_positions + levels)
        return self.level_places[level - 1]

    def _forward(self, embeds: torch.Tensor, features: torch.Tensor, seen: Visibilities, places: Any) -> torch.Tensor:
        """Features (B, T, H) of new tokens, embeds (B, T, H), behind those in the cache."""
        return self.forward(embeds, features, seen, places, self.cache)

    def _make_cache(self, batch_size: int) -> Cache:
        """A cache whose layers stand where tokens or, those of cross-attention, features do."""
        config = self.drafter.config
        slots = [self.features if kind == "cross" else self.tokens for kind in config.block_types]
        if self.compiled is None:
            return slot_cache(slots)
        shape: Any = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        return slot_cache(slots, torch.empty(shape, dtype=self.drafter.dtype, device=self.drafter.device))

    @property
    def _layers(self) -> list[SlotLayer]:
        return self.cache.layers  # type: ignore[return-value]


@dataclass(frozen=True)
class DreamLevels:
    """The levels of a tree below the last token that a drafter has read; what `grow_tree` grows from.

    Args:
        state (`DrafterState`): A state that has read all verified text; its tentative slots are empty between two trees.
        head (`TargetHead`): The target's embedding and head.
    """

    state: DrafterState
    head: TargetHead

    def first_level(self, num_levels: int, top_k: int) -> SlotLevel:
        """The likeliest tokens below the last one of each row."""
        state = self.state
        assert state.root_features is not None  # something has been read
        num_columns = state.reserve(num_levels * top_k)
        lengths = state.tokens.tensor(state.drafter.device)
        with phase(DRAFTER):
            return first_level(self.head, state.root_features, lengths, num_columns, top_k)

    def next_level(self, level: SlotLevel, places: list[int], depth: int, top_k: int) -> SlotLevel:
        """Run the best nodes of a level at `places`, tentatively, and find `top_k` children of each."""
        return self.state.next_level(self.head, level, places, depth, top_k)

    def forget_levels(self) -> None:
        """Empty the tentative slots."""
        self.state.forget_beams()
