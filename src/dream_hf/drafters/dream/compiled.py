"""Compiled drafting: a level at a time, or a whole draft, for which what a step gained is read and a tree is grown below it.

On an accelerator a draft costs its launches rather than its arithmetic, and a graph of them costs one. A whole draft is one
graph: nobody looks at it on the way, and all that changes from step to step lies in buffers that stay where they are.
B rows, P tokens gained at most, N nodes, k beams per level, H width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache

from ...decoding.settings import DraftSettings
from ...decoding.tree import DraftTree
from ...runtime.compilation import Settings as CompileSettings
from ...runtime.compilation import compiled_function
from ...runtime.counts import Counts
from ...runtime.leases import Lease
from ...runtime.phases import GROWTH, phase
from ..growth import CandidatePlaces, grow_whole_tree, whole_places
from ..levels import Beams, SlotLevel, TargetHead, first_level, next_level
from ..visibility import bias_of, shown_columns
from .functional import DecodingForward
from .modeling import DreamModel


class CompiledLevels:
    """Runs whole levels as one compiled function, in buffers that stay where they are.

    Args:
        drafter (`DreamModel`): One that is [`is_plain_throughout`].
        compilation (`CompileSettings`): How to compile.
    """

    def __init__(self, drafter: DreamModel, compilation: CompileSettings):
        self.run = compiled_function(drafter, run_level, compilation)

    def __call__(
        self, forward: DecodingForward, cache: Any, head: TargetHead, beams: Beams, places: Any, top_k: int
    ) -> SlotLevel:
        """The children of the beams, which are written to the cache."""
        if beams.sees.device.type == "cpu":
            torch._dynamo.maybe_mark_dynamic(beams.sees, 2)  # one graph for all capacities
        level = self.run(forward, cache, head, beams, places, top_k)
        if beams.features.device.type == "cpu":
            return level
        return tree_map(torch.clone, level)  # a captured graph writes its next results over these


def run_level(
    forward: DecodingForward, cache: Cache, head: TargetHead, beams: Beams, places: Any, top_k: int
) -> SlotLevel:
    """A whole level as one function of tensors, to be compiled: the beams go in, their children come out."""
    embeds = head.embed(beams.tokens).to(beams.features.device, beams.features.dtype)
    hidden = forward(embeds, beams.features, shown_columns(beams.sees), places, cache)
    return next_level(head, beams, hidden, top_k)


Gained = tuple[torch.Tensor, torch.Tensor, Counts]  # tokens (B, T), features (B, T, H), how many of both count


class TreeBuffers(NamedTuple):
    """The tree, as [`DraftTree`] has it."""

    tokens: torch.Tensor  # (B, N)
    parents: torch.Tensor  # (B, N)
    depths: torch.Tensor  # (B, N)
    ancestors: torch.Tensor  # (B, N, N)
    log_probs: torch.Tensor  # (B, N)


class DraftBuffers(NamedTuple):
    """What a draft reads (to `root_positions`) and writes, beside the drafter's caches."""

    gained: torch.Tensor  # (B, P), tokens
    features: torch.Tensor  # (B, P, H), the target's, that they were chosen from
    counts: torch.Tensor  # (B,), how many of both count
    roots: torch.Tensor  # (B, 1), the last token of each row
    root_features: torch.Tensor  # (B, 1, H), the drafter's own, of the last token before what was gained
    root_positions: torch.Tensor  # (B, 1)
    next_features: torch.Tensor  # (B, 1, H), the same behind it
    next_positions: torch.Tensor  # (B, 1)
    starts: tuple[torch.Tensor, ...]  # (B,) each, the slots of tokens and of features that are written next
    tree: TreeBuffers


class WholeDraft:
    """Drafts whole trees with one compiled function.

    Args:
        drafter (`DreamModel`): One that is [`is_plain_throughout`].
        compilation (`CompileSettings`): How to compile.
        lease (`Lease`): Where the buffers lie.
    """

    buffers: DraftBuffers  # of the last draft that has begun

    def __init__(self, drafter: DreamModel, compilation: CompileSettings, lease: Lease):
        self.run = compiled_function(drafter, run_draft, compilation)
        self.drafter, self.lease = drafter, lease
        self.columns = torch.empty(0, device=drafter.device)
        self.begun: tuple[torch.Tensor, DraftTree] | None = None  # a draft nobody has asked for yet, and its counts

    def __call__(self, state: Any, head: TargetHead, roots: torch.Tensor, gained: Gained | None) -> DraftTree:
        """A tree of all levels below the `roots` (B, 1), behind what was gained, which the state has read then.

        Nothing is left to do if the draft has begun with the same counts. The tree is overwritten by the next one.

        Args:
            state (`DrafterState`): Its tentative slots are empty before and after.
            head (`TargetHead`): The target's embedding and head.
            roots (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
            gained (`tuple`, *optional*): Tokens (B, P or fewer), the features they were chosen from, and [`Counts`].
        """
        (begun, tree), self.begun = self.begun or (None, None), None
        if gained is None:
            tree = self.begin(state, head, roots)
        else:
            tokens, features, counts = gained
            if tree is None or counts.on(roots.device) is not begun:
                tree = self.begin(state, head, roots, tokens, features, counts.on(roots.device))
            state.commit(counts)
        state.root_features, state.root_positions = self.buffers.next_features, self.buffers.next_positions
        return tree

    def look_ahead(
        self, state: Any, head: TargetHead, tokens: torch.Tensor, features: torch.Tensor, counts: torch.Tensor
    ) -> DraftTree:
        """Begin the draft behind the first `counts` (B,) of `tokens` (B, P), whether or not that is what is gained."""
        tree = self.begin(state, head, tokens.gather(1, counts[:, None] - 1), tokens, features, counts)
        self.begun = counts, tree
        return tree

    def begin(
        self,
        state: Any,
        head: TargetHead,
        roots: torch.Tensor,
        tokens: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> DraftTree:
        """Run the draft below `roots` (B, 1) behind the first `counts` (B,) of `tokens` (B, P); the state stays as it is."""
        settings, device = state.settings, self.drafter.device
        num_columns = state.reserve(settings.tree_depth + 1 + settings.tree_depth * settings.tree_top_k)
        self.buffers = buffers = self._buffers(state, len(roots))
        buffers.roots.copy_(roots)
        if state.root_features is not buffers.root_features:
            buffers.root_features.copy_(state.root_features)
            buffers.root_positions.copy_(state.root_positions)
            state.root_features, state.root_positions = buffers.root_features, buffers.root_positions
        if tokens is None or features is None or counts is None:
            buffers.counts.zero_()
        else:
            buffers.gained[:, : tokens.shape[1]].copy_(tokens)
            buffers.features[:, : features.shape[1]].copy_(features)
            buffers.counts.copy_(counts)
        if len(self.columns) != num_columns:
            self.columns = torch.arange(num_columns, device=device)
            if device.type == "cpu":
                torch._dynamo.maybe_mark_dynamic(self.columns, 0)  # one graph for all capacities
        with phase(GROWTH):
            places = whole_places(settings, device)
            self.run(state.forward, state.cache, head, buffers, self.columns, places, settings)
        tree = buffers.tree
        return DraftTree(tree.tokens, tree.parents, tree.depths, tree.ancestors, settings.tree_depth, tree.log_probs)

    def _buffers(self, state: Any, batch_size: int) -> DraftBuffers:
        """The buffers, in the lease."""
        config, settings, device = self.drafter.config, state.settings, self.drafter.device
        num_candidates = len(whole_places(settings, device).prices)
        num_nodes, path_size = min(settings.tree_size, num_candidates) + 1, settings.tree_depth + 1
        ids = torch.empty(0, dtype=torch.long, device=device)
        states = torch.empty(0, dtype=self.drafter.dtype, device=device)
        flags = torch.empty(0, dtype=torch.bool, device=device)
        scores = states.new_empty(0, dtype=torch.promote_types(states.dtype, torch.float32))

        def make(name: str, like: torch.Tensor, *shape: int) -> torch.Tensor:
            return self.lease.buffer(f"draft.{name}", like, (batch_size, *shape))

        tree = TreeBuffers(
            make("tokens", ids, num_nodes),
            make("parents", ids, num_nodes),
            make("depths", ids, num_nodes),
            make("ancestors", flags, num_nodes, num_nodes),
            make("log_probs", scores, num_nodes),
        )
        return DraftBuffers(
            make("gained", ids, path_size),
            make("features", states, path_size, config.hidden_size),
            make("counts", ids),
            make("roots", ids, 1),
            make("root_features", states, 1, config.hidden_size),
            make("root_positions", ids, 1),
            make("next_features", states, 1, config.hidden_size),
            make("next_positions", ids, 1),
            tuple(slots.pointers(device).starts for slots in (state.tokens, state.features)),
            tree,
        )


def run_draft(
    forward: DecodingForward,
    cache: Cache,
    head: TargetHead,
    buffers: DraftBuffers,
    columns: torch.Tensor,
    places: CandidatePlaces,
    settings: DraftSettings,
) -> None:
    """Read what was gained, and grow a tree below it: a function of tensors, to be compiled.

    Args:
        forward (`DecodingForward`): The drafter.
        cache (`Cache`): What it has read, in fixed buffers.
        head (`TargetHead`): The target's embedding and head.
        buffers (`DraftBuffers`): What goes in and comes out. `starts` are what they were in the end.
        columns (`torch.LongTensor` of shape `(columns,)`): The columns of masks, counted.
        places (`CandidatePlaces`): As [`whole_places`] says.
        settings (`DraftSettings`): Shape of the tree.
    """
    _read(forward, cache, head, buffers, columns)
    levels = _Levels(forward, cache, head, buffers, columns)
    tree = grow_whole_tree(levels, buffers.roots, settings, places)
    assert tree.log_probs is not None  # growth knows them
    found = (tree.tokens, tree.parents, tree.depths, tree.ancestors, tree.log_probs)
    for buffer, value in zip(buffers.tree, found, strict=True):
        buffer.copy_(value)


def _read(
    forward: DecodingForward, cache: Cache, head: TargetHead, buffers: DraftBuffers, columns: torch.Tensor
) -> None:
    """Read the tokens that were gained; `starts` move on behind them."""
    embeds, counts = head.embed(buffers.gained), buffers.counts
    embeds = embeds.to(buffers.features.device, buffers.features.dtype)
    steps = torch.arange(embeds.shape[1], device=columns.device)
    own = buffers.starts[0][:, None] + steps
    seen = shown_columns(bias_of(columns <= own[..., None], embeds.dtype))
    places = forward.places(embeds, buffers.root_positions + 1 + steps)
    hidden = forward(embeds, buffers.features, seen, places, cache)
    last = (counts - 1).clamp(min=0)[:, None, None].expand(-1, -1, hidden.shape[-1])
    is_new = (counts > 0)[:, None, None]
    buffers.next_features.copy_(torch.where(is_new, hidden.gather(1, last), buffers.root_features))
    buffers.next_positions.copy_(buffers.root_positions + counts[:, None])
    for starts in buffers.starts:
        starts.add_(counts)


@dataclass
class _Levels:
    """Levels below what was read, every one of them whole; see [`LevelSource`]."""

    forward: DecodingForward
    cache: Cache
    head: TargetHead
    buffers: DraftBuffers
    columns: torch.Tensor

    def first_level(self, num_levels: int, top_k: int) -> SlotLevel:
        buffers = self.buffers
        positions = buffers.next_positions + torch.arange(1, num_levels + 1, device=self.columns.device)
        self.places = self.forward.places_of_levels(buffers.next_features, positions)
        self.num_written = 0
        return first_level(self.head, buffers.next_features, buffers.starts[0], self.columns.shape[0], top_k)

    def next_level(self, level: SlotLevel, places: list[int], depth: int, top_k: int) -> SlotLevel:
        beams = level.beams(places)
        level = run_level(self.forward, self.cache, self.head, beams, self.places[depth - 1], top_k)
        self.num_written += top_k
        for starts in self.buffers.starts:
            starts.add_(top_k)
        return level

    def forget_levels(self) -> None:
        for starts in self.buffers.starts:
            starts.sub_(self.buffers.counts + self.num_written)
