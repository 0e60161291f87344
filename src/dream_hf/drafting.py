"""Growing a draft tree with the drafter (paper, section 3.1; the dynamic tree of EAGLE-2, arXiv 2406.16858).

B rows, k beams per level, N drafted nodes, H width. The drafter's caches hold the verified tokens and features; while a
tree grows, its beams sit in the tentative slots behind them, and a beam sees of those only its own ancestors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .caches import Slots, slot_cache
from .compiling import Settings, compiled_function
from .compression import DrafterText
from .configuration_dream import DreamConfig
from .lean import Angles, lean_drafter
from .levels import Beams, Level, TargetHead, first_level, lean_level, next_level
from .modeling_dream import DraftMasks, DreamDrafter
from .static_caches import StaticSlotLayer, StaticSlots, static_cache
from .threads import cpu_threads
from .tree import DraftTree

# Scores of a child and its parent can tie when the child is certain. A small price per level makes parents win, so that
# a node is never kept without its parent.
LEVEL_PRICE = 1e-3


class DrafterState:
    """A drafter in mid-decoding: its caches, and where each row stands.

    A row's features are one fewer than its tokens: the last token has not been through the target. Feature slot s holds
    what produced the token in slot s + 1, so whoever sees that token sees that feature, and one mask serves both.

    Args:
        drafter (`DreamDrafter`): The drafter; not changed.
        batch_size (`int`): Rows.
        settings (`Settings`, *optional*): Compile the levels of trees like this. A drafter without a lean form is not
            compiled.
    """

    def __init__(self, drafter: DreamDrafter, batch_size: int, settings: Settings | None = None):
        self.drafter, config = drafter, drafter.config
        self.lean = lean_drafter(drafter)
        self.compiled = None
        if settings is not None and self.lean is not None:
            self.compiled = compiled_function(drafter, lean_level, settings)
        make_slots = Slots if self.compiled is None else StaticSlots
        self.tokens, self.features = make_slots([0] * batch_size), make_slots([0] * batch_size)
        slots_of_layers: list[Any] = [self.features if kind == "cross" else self.tokens for kind in config.block_types]
        if self.compiled is None:
            self.cache = slot_cache(slots_of_layers)
        else:
            shape: Any = (batch_size, config.num_key_value_heads, 0, config.head_dim)
            self.cache = static_cache(slots_of_layers, torch.empty(shape, dtype=drafter.dtype, device=drafter.device))
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
        positions = positions.to(device)
        num_tokens, num_missing = embeds.shape[1], embeds.shape[1] - features.shape[1]
        own = self.tokens.tensor(device)[:, None] + torch.arange(num_tokens, device=device)
        sees = torch.arange(self.reserve(num_tokens), device=device) <= own[..., None]
        is_prompt = not self.features.longest  # many tokens: as many threads as there are
        with cpu_threads(None if is_prompt else self.drafter.config.draft_threads):
            hidden = self._forward(embeds.to(device, dtype), features.to(device, dtype), sees, positions)
        self.level_angles = None
        self.tokens.commit(counts)
        self.features.commit([max(count - num_missing, 0) for count in counts])
        last = torch.tensor([max(count - 1, 0) for count in counts], device=device)[:, None]
        self.root_features = hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[-1]))
        self.root_positions = positions.gather(1, last)

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
        features = text.features if known is None else torch.cat([known, text.features], dim=1)
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
        for layer in self.cache.layers:
            if isinstance(layer, StaticSlotLayer):
                layer.reserve(num_new)
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

    def next_level(self, head: TargetHead, beams: Beams, depth: int, top_k: int) -> Level:
        """Run the beams at a depth, tentatively, and find `top_k` children of each."""
        like = beams.features
        if self.compiled is None:
            embeds = head.embed(beams.tokens).to(like.device, like.dtype)
            return next_level(head, beams, self.beams(embeds, like, beams.sees, depth), top_k)
        level = self._compiled_level(head, beams, depth, top_k)
        self.extend(beams.tokens.shape[1])
        if like.device.type == "cpu":
            return level
        return tree_map(torch.clone, level)  # a captured graph writes its next results over these

    def _compiled_level(self, head: TargetHead, beams: Beams, depth: int, top_k: int) -> Level:
        num_beams, angles = beams.tokens.shape[1], self.angles_of(depth, beams.features)
        if num_beams < top_k or depth == 1:  # views: other strides would be another graph
            beams = Beams(*(part.clone(memory_format=torch.contiguous_format) for part in beams))
        num_columns = self._num_slots(self.tokens, num_beams), self._num_slots(self.features, num_beams)
        return self.compiled(self.lean, self.cache, head, beams, angles, num_columns, top_k)  # type: ignore[misc]

    def extend(self, num_beams: int) -> None:
        """Take note that a level has been written to the tentative slots."""
        self.tokens.extend(num_beams)
        self.features.extend(num_beams)

    def limit(self, num_tokens: int | None) -> None:
        """Let buffers have no more room than for this many tokens in a row, beams included."""
        self.tokens.limit = self.features.limit = num_tokens

    def forget_beams(self) -> None:
        """Take the tentative slots back."""
        self.tokens.rollback()
        self.features.rollback()

    def angles_of(self, level: int, like: torch.Tensor) -> Angles | None:
        """Rotary angles of a level, all beams of which have one position; computed for all levels together."""
        if self.lean is None or self.root_positions is None:
            return None
        if self.level_angles is None or level > self.level_angles[0].shape[2]:
            levels = torch.arange(1, max(level, self.drafter.config.tree_depth) + 1, device=like.device)
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
        num_tokens, num_features = embeds.shape[1], features.shape[1]
        seen_features = sees[..., 1 : 1 + self._num_slots(self.features, num_features)]
        masks = DraftMasks(sees[..., : self._num_slots(self.tokens, num_tokens)], seen_features)
        if self.lean is not None and self.features.longest:  # else the first token sees no feature
            if angles is None:
                angles = self.lean.angles(embeds, positions)  # type: ignore[arg-type]
            return self.lean(embeds, features, masks, angles, self.cache)
        outputs = self.drafter(
            embeds, features, attention_mask=masks, position_ids=positions, past_key_values=self.cache
        )
        return outputs.last_hidden_state

    def _num_slots(self, slots: Slots, num_new: int) -> int:
        """Slots that attention is shown when `num_new` are written: those in use, or all of a buffer of fixed size."""
        if self.compiled is not None:
            for layer in self.cache.layers:
                if isinstance(layer, StaticSlotLayer) and layer.slots is slots:
                    return layer.get_mask_sizes(num_new)[0]
        return slots.end + num_new


@dataclass
class _Candidates:
    """All expanded nodes so far, in order of levels: tokens and cumulative log-probabilities (B, n) of each level.

    `beams` (B, b) of a level are those it comes from, as places in the level above, and -1 for the root.
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    beams: list[torch.Tensor] = field(default_factory=list)

    def add(self, level: Level, beams: torch.Tensor) -> None:
        """Add a level, whose nodes are the children of `beams` (B, b), equally many of each."""
        self.tokens.append(level.tokens)
        self.scores.append(level.scores)
        self.beams.append(beams)

    def parents(self) -> torch.Tensor:
        """Parent of each candidate among all of them, -1 for the root: (B, C)."""
        starts, above = [0], 0  # where the level above a level starts
        for tokens in self.tokens[:-1]:
            starts.append(above)
            above += tokens.shape[1]
        beams = torch.cat(self.beams, dim=1)
        start = [start for start, level in zip(starts, self.beams, strict=True) for _ in range(level.shape[1])]
        children = self.tokens[0].shape[1]
        return (beams + torch.tensor(start, device=beams.device))[..., None].expand(-1, -1, children).flatten(1)


def grow_tree(
    state: DrafterState,
    head: TargetHead,
    root_tokens: torch.Tensor,
    config: DreamConfig,
    max_depth: int | None = None,
) -> DraftTree:
    """Draft a tree below each row's last token.

    At every level the `tree_top_k` beams of highest cumulative probability are each expanded by their `tree_top_k`
    likeliest tokens; of all expanded nodes the `tree_size` best are kept, and a kept node's parent always is. With the
    config's thresholds growth stops, and nodes are left out, where they are reached too rarely; it also stops where all
    beams end the text.

    Args:
        state (`DrafterState`): A state that has read all verified text; its tentative slots are empty again on return.
        head (`TargetHead`): The target's embedding and head.
        root_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
        config (`DreamConfig`): `tree_depth`, `tree_top_k`, `tree_size`, `tree_min_level_probability`,
            `tree_min_node_probability` and `draft_threads`.
        max_depth (`int`, *optional*): Most levels that can be of use, 0 for the root alone; by default `config.tree_depth`.

    Returns:
        `DraftTree`: At most `tree_size` nodes and the root, on the state's device.
    """
    root_tokens = root_tokens.to(state.drafter.device)
    num_levels = config.tree_depth if max_depth is None else min(max_depth, config.tree_depth)
    if num_levels < 1:
        return DraftTree.chain(root_tokens)
    with cpu_threads(config.draft_threads):
        return _best_tree(_expand_levels(state, head, config, num_levels), root_tokens, config)


def _expand_levels(state: DrafterState, head: TargetHead, config: DreamConfig, num_levels: int) -> _Candidates:
    """All nodes found on the way down, level by level."""
    found, top_k = _Candidates(), config.tree_top_k
    assert state.root_features is not None  # something has been read
    num_columns = state.reserve(num_levels * top_k)
    lengths = state.tokens.tensor(state.drafter.device)
    level = first_level(head, state.root_features, lengths, num_columns, top_k)
    found.add(level, torch.full_like(level.tokens[:, :1], -1))
    for depth in range(1, num_levels):
        promising = _promising(level.beams, head, config)
        if not promising:
            break
        expanded = level.only(promising)
        level = state.next_level(head, expanded.beams, depth, top_k)
        found.add(level, expanded.chosen)
    state.forget_beams()
    return found


def _best_tree(found: _Candidates, root_tokens: torch.Tensor, config: DreamConfig) -> DraftTree:
    """Keep the `tree_size` best candidates, in the order they were found, so that parents come first."""
    num_nodes, num_levels = config.tree_size, len(found.tokens)
    scores = torch.cat(found.scores, dim=1)
    scores = scores - _level_prices(tuple(level.shape[1] for level in found.scores), scores.device)
    best = scores.topk(min(num_nodes, scores.shape[1]), dim=-1)
    if config.tree_min_node_probability:
        is_likely = best.values >= math.log(config.tree_min_node_probability)
        num_nodes = max(int(is_likely.sum(-1).max()), 1)
    chosen = best.indices[:, :num_nodes].sort(dim=-1).values
    tokens = torch.cat(found.tokens, dim=1).gather(1, chosen)
    parents = found.parents().gather(1, chosen)

    # Node index of every candidate: 0 for the root, kept at the end so that parent -1 finds it.
    nodes = torch.zeros(scores.shape[0], scores.shape[1] + 1, dtype=torch.long, device=scores.device)
    nodes.scatter_(1, chosen, torch.arange(1, chosen.shape[1] + 1, device=scores.device).expand_as(chosen))
    parents = nodes.gather(1, parents % nodes.shape[1])
    return DraftTree.from_parents(
        torch.cat([root_tokens, tokens], dim=1),
        torch.cat([torch.zeros_like(root_tokens), parents], dim=1),
        num_levels,
    )


@lru_cache(maxsize=64)
def _level_prices(level_sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """`LEVEL_PRICE` times the level of every candidate, (C,)."""
    return torch.tensor([LEVEL_PRICE * level for level, size in enumerate(level_sizes) for _ in range(size)]).to(
        device
    )


def _promising(beams: Beams, head: TargetHead, config: DreamConfig) -> list[int]:
    """Which of the beams to expand: none where they are reached too rarely together, or all of them end the text.

    A beam that every row would leave out, with all that is below it, is not worth it. Off the CPU, without thresholds, that
    is not worth a transfer to the host.
    """
    min_level, min_node = config.tree_min_level_probability, config.tree_min_node_probability
    if beams.scores.device.type != "cpu" and not min_level and not min_node:
        return list(range(beams.scores.shape[1]))
    rows = [
        [0.0 if token in head.ends else math.exp(score) for token, score in zip(*row, strict=True)]
        for row in zip(beams.tokens.tolist(), beams.scores.tolist(), strict=True)
    ]
    if max(sum(row) for row in rows) < min_level:
        return []
    return [beam for beam, values in enumerate(zip(*rows, strict=True)) if (best := max(values)) and best >= min_node]
