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
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from ...decoding.settings import DraftSettings
from ...runtime.compilation import Settings as CompileSettings
from ...runtime.compilation import compiled_function
from ...runtime.kv_cache import Slots, slot_cache
from ...runtime.phases import DRAFTER, phase
from ...runtime.static_kv_cache import StaticSlotLayer, StaticSlots, static_cache
from ...runtime.threads import cpu_threads
from ..levels import Beams, SlotLevel, TargetHead, first_level, next_level
from ..masked_attention import MASK_ENTRIES
from ..visibility import DraftMasks, FromStart
from .compression import DrafterText
from .functional import Angles, LeanDrafter, lean_drafter
from .modeling import DreamModel


class DrafterState:
    """The state of a drafter.

    A row's features are one fewer than its tokens: the last token has not been through the target. Feature slot s holds
    what produced the token in slot s + 1, so whoever sees that token sees that feature, and one mask serves both.

    Args:
        drafter (`DreamModel`): The drafter; not changed.
        batch_size (`int`): Rows.
        settings (`DraftSettings`, *optional*): How to draft; by default as the drafter's config says.
    """

    def __init__(self, drafter: DreamModel, batch_size: int, settings: DraftSettings | None = None):
        self.drafter = drafter
        self.settings = settings or DraftSettings.of(drafter.config)
        self.lean = lean_drafter(drafter)
        self.tokens, self.features, self.cache = self._make_cache(batch_size)
        self.root_features: torch.Tensor | None = None  # (B, 1, H), the drafter's own for the last token
        self.root_positions: torch.Tensor | None = None  # (B, 1)
        self.level_angles: Angles | None = None  # of the levels below the last token

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
        self.level_angles = None
        self.tokens.commit(counts)
        self.features.commit([max(count - num_missing, 0) for count in counts])
        last = torch.tensor([max(count - 1, 0) for count in counts], device=device)[:, None]
        self.root_features = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        self.root_positions = positions.gather(1, last)

    def _read_start(self, embeds: torch.Tensor, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Read the start of all rows' texts at once, which takes no masks: features (B, T, H)."""
        self.reserve(embeds.shape[1])
        masks = DraftMasks(FromStart(), FromStart(behind=1))
        return self._run_modules(embeds, features, masks, positions)

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
            hidden.append(self._forward(embeds[:, part], features[:, part], sees, positions[:, part]))
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
        self.read(embeds, features, positions, (text.counts + 1).tolist())

    def read_on(self, embeds: torch.Tensor, features: torch.Tensor, counts: Sequence[int]) -> None:
        """Take in what came right after the last token: embeds and features (B, T, H), `counts[b]` tokens of row b."""
        assert self.root_positions is not None  # something has been read
        steps = torch.arange(1, embeds.shape[1] + 1, device=self.drafter.device)
        self.read(embeds, features, self.root_positions + steps, counts)

    def reserve(self, num_new: int) -> int:
        """Make room for `num_new` tentative slots; returns how many columns a mask over all slots has.

        Column c stands for token slot c and feature slot c - 1.
        """
        return max(self._num_slots(self.tokens, num_new), self._num_slots(self.features, num_new) + 1)

    def beams(self, embeds: torch.Tensor, features: torch.Tensor, sees: torch.Tensor, level: int) -> torch.Tensor:
        """Run one level's beams, tentatively: embeds (B, k, H), their parents' features (B, k, H) -> features (B, k, H).

        `sees` (B, k, columns) tells which slots each beam sees: the verified ones, its ancestors' and its own.
        """
        assert self.root_positions is not None  # something has been read
        if self.lean is not None and self.features.longest:
            hidden = self._forward(embeds, features, sees, None, self.angles_of(level, embeds))
        else:
            positions = (self.root_positions + level).expand(-1, embeds.shape[1])
            hidden = self._forward(embeds, features, sees, positions)
        self.extend(embeds.shape[1])
        return hidden

    def next_level(self, head: TargetHead, beams: Beams, depth: int, top_k: int) -> SlotLevel:
        """Run the beams at a depth, tentatively, and find `top_k` children of each."""
        with phase(DRAFTER):
            embeds = head.embed(beams.tokens).to(beams.features.device, beams.features.dtype)
            return next_level(head, beams, self.beams(embeds, beams.features, beams.sees, depth), top_k)

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
            layers: list[Any] = self.cache.layers
            for layer in layers:
                layer.leave_inference_mode()

    def forget_beams(self) -> None:
        """Take the tentative slots back."""
        self.tokens.rollback()
        self.features.rollback()

    def angles_of(self, level: int, like: torch.Tensor) -> Angles | None:
        """Rotary angles of a level, all beams of which have one position; computed for all levels together."""
        if self.lean is None or self.root_positions is None:
            return None
        if self.level_angles is None or level > self.level_angles[0].shape[2]:
            levels = torch.arange(1, max(level, self.settings.tree_depth) + 1, device=like.device)
            self.level_angles = self.lean.angles(like, self.root_positions + levels)
        cos, sin = self.level_angles
        return cos[:, :, level - 1 : level], sin[:, :, level - 1 : level]

    def _forward(
        self,
        embeds: torch.Tensor,
        features: torch.Tensor,
        sees: torch.Tensor,
        positions: torch.Tensor | None,  # not needed where there are angles
        angles: Angles | None = None,
    ) -> torch.Tensor:
        if self.lean is not None and self.features.longest:  # else the first token sees no feature
            if angles is None:
                angles = self.lean.angles(embeds, positions)  # type: ignore[arg-type]
            return self.lean(embeds, features, sees, angles, self.cache)
        num_tokens = self._num_slots(self.tokens, embeds.shape[1])
        num_features = self._num_slots(self.features, features.shape[1])
        masks = DraftMasks(sees[..., :num_tokens], sees[..., 1 : 1 + num_features])
        return self._run_modules(embeds, features, masks, positions)

    def _run_modules(
        self, embeds: torch.Tensor, features: torch.Tensor, masks: DraftMasks, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """The drafter's forward as its modules compute it: features (B, T, H)."""
        outputs = self.drafter(
            embeds, features, attention_mask=masks, position_ids=positions, past_key_values=self.cache
        )
        return outputs.last_hidden_state

    def _make_cache(self, batch_size: int) -> tuple[Slots, Slots, Cache]:
        """Slots of tokens, slots of features, and a cache whose layers stand where these say."""
        tokens, features = Slots([0] * batch_size), Slots([0] * batch_size)
        return tokens, features, slot_cache(self._by_layer(tokens, features))

    def _by_layer(self, tokens: Any, features: Any) -> list[Any]:
        """What each layer's keys stand for: cross-attention looks at features."""
        return [features if kind == "cross" else tokens for kind in self.drafter.config.block_types]

    def _num_slots(self, slots: Slots, num_new: int) -> int:
        """Slots that attention is shown when `num_new` are written."""
        return slots.end + num_new


class CompiledDrafterState(DrafterState):
    """A [`DrafterState`] whose levels are compiled, in buffers that stay where they are.

    Args:
        drafter (`DreamModel`): One that has a lean form.
        batch_size (`int`): Rows.
        compilation (`CompileSettings`): How to compile.
        settings (`DraftSettings`, *optional*): How to draft; by default as the drafter's config says.
    """

    def __init__(
        self,
        drafter: DreamModel,
        batch_size: int,
        compilation: CompileSettings,
        settings: DraftSettings | None = None,
    ):
        super().__init__(drafter, batch_size, settings)
        self.run_level = compiled_function(drafter, lean_level, compilation)
        self.counts_seen: set[int] = set()  # how many beams levels have had so far

    def reserve(self, num_new: int) -> int:
        for layer in self._layers:
            layer.reserve(num_new)
        return super().reserve(num_new)

    def next_level(self, head: TargetHead, beams: Beams, depth: int, top_k: int) -> SlotLevel:
        with phase(DRAFTER):
            level = self._compiled_level(head, beams, depth, top_k)
        self.extend(beams.tokens.shape[1])
        if beams.features.device.type == "cpu":
            return level
        return tree_map(torch.clone, level)  # a captured graph writes its next results over these

    def _compiled_level(self, head: TargetHead, beams: Beams, depth: int, top_k: int) -> SlotLevel:
        angles = self.angles_of(depth, beams.features)
        beams = Beams(*(part.clone(memory_format=torch.contiguous_format) for part in beams))  # one layout, one graph
        num_beams = beams.tokens.shape[1]
        if self._layers[0].is_dynamic and num_beams not in self.counts_seen:
            let_beams_vary(beams)  # in case this level, the first of its kind, gets compiled
            self.counts_seen.add(num_beams)
        return self.run_level(self.lean, self.cache, head, beams, angles, top_k)

    @property
    def _layers(self) -> list[StaticSlotLayer]:
        return self.cache.layers  # type: ignore[return-value]

    def _make_cache(self, batch_size: int) -> tuple[Slots, Slots, Cache]:
        tokens, features = StaticSlots([0] * batch_size), StaticSlots([0] * batch_size)
        config = self.drafter.config
        shape: Any = (batch_size, config.num_key_value_heads, 0, config.head_dim)
        empty = torch.empty(shape, dtype=self.drafter.dtype, device=self.drafter.device)
        return tokens, features, static_cache(self._by_layer(tokens, features), empty)

    def _num_slots(self, slots: Slots, num_new: int) -> int:
        """As many as the buffers have, in which every layer of the same slots has as many."""
        layers = [layer for layer in self._layers if layer.slots is slots]
        return layers[0].get_mask_sizes(num_new)[0] if layers else super()._num_slots(slots, num_new)


def make_drafter_state(
    drafter: DreamModel, batch_size: int, compilation: CompileSettings | None, settings: DraftSettings
) -> DrafterState:
    """A state whose levels are compiled, if `compilation` says how and the drafter has a lean form."""
    if compilation is None or lean_drafter(drafter) is None:
        return DrafterState(drafter, batch_size, settings)
    return CompiledDrafterState(drafter, batch_size, compilation, settings)


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
        return self.state.next_level(self.head, level.beams(places), depth, top_k)

    def forget_levels(self) -> None:
        """Empty the tentative slots."""
        self.state.forget_beams()


def lean_level(
    lean: LeanDrafter,
    cache: Cache,
    head: TargetHead,
    beams: Beams,
    angles: Angles,
    top_k: int,
) -> SlotLevel:
    """A whole level as one function of tensors, to be compiled: the beams go in, their children come out."""
    embeds = head.embed(beams.tokens).to(beams.features.device, beams.features.dtype)
    return next_level(head, beams, lean(embeds, beams.features, beams.sees, angles, cache), top_k)


def let_beams_vary(beams: Beams) -> None:
    """Let code compiled for these beams serve any other number of them (but one, which is another graph) and of columns."""
    for part in beams[:-1]:
        torch._dynamo.maybe_mark_dynamic(part, 1)
    torch._dynamo.maybe_mark_dynamic(beams.sees, 2)
