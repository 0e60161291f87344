"""Growing a draft tree level by level (paper, section 3.1; the dynamic tree of EAGLE-2, arXiv 2406.16858).

What a level costs and how it is made is a drafter's business; which nodes are expanded and which are kept is decided here, the
same for all of them. B rows, k beams per level, N drafted nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree
from ..runtime import crossings
from ..runtime.phases import GROWTH, phase
from ..runtime.threads import cpu_threads
from .levels import index_of

# Scores of a child and its parent can tie when the child is certain. A small price per level makes parents win, so that
# a node is never kept without its parent.
LEVEL_PRICE = 1e-3
LOOK_EVERY = 4  # levels of a tree that is grown on an accelerator, of which one is looked at


class Level(Protocol):
    """What growth has to know of a level: all nodes that were found, n in each row, and the k best of them."""

    tokens: torch.Tensor  # (B, n)
    scores: torch.Tensor  # (B, n), cumulative log-probabilities
    best: torch.Tensor  # (B, k), places of the best nodes among all, best first
    best_tokens: torch.Tensor  # (B, k)
    best_scores: torch.Tensor  # (B, k)


class LevelSource(Protocol):
    """What makes levels, of any kind that has what [`Level`] names: a drafter that has read all verified text."""

    def first_level(self, num_levels: int, top_k: int) -> Any:
        """The likeliest tokens below the root, of a tree that may have up to `num_levels` levels."""

    def next_level(self, level: Any, places: list[int], depth: int, top_k: int) -> Any:
        """`top_k` children of each of the best nodes of `level` at `places`, which are at a depth of `depth`.

        Or of all the best nodes, where that is as cheap: those elsewhere have children of no probability.
        """

    def forget_levels(self) -> None:
        """The tree is done; what was written for it can go."""


class LevelSession(Protocol):
    """A session whose trees are grown from levels, and that lets others grow theirs."""

    def levels(self) -> LevelSource:
        """What makes levels below the last tokens; all verified text has been read by then."""


class CandidatePlaces(NamedTuple):
    """What follows from the numbers of candidates in each level alone."""

    prices: torch.Tensor  # (C,), `LEVEL_PRICE` times the level of every candidate
    starts_above: torch.Tensor  # (m in all,), where the level above each expanded node starts among all candidates


@dataclass
class _Candidates:
    """All expanded nodes so far, in order of levels: tokens and cumulative log-probabilities (B, n) of each level.

    `parents` (B, m) of a level are the nodes it comes from, as places in the level above, and -1 for the root.
    """

    tokens: list[torch.Tensor] = field(default_factory=list)
    scores: list[torch.Tensor] = field(default_factory=list)
    parents: list[torch.Tensor] = field(default_factory=list)

    def add(self, level: Level, parents: torch.Tensor) -> None:
        """Add a level, whose nodes are the children of `parents` (B, m), equally many of each."""
        self.tokens.append(level.tokens)
        self.scores.append(level.scores)
        self.parents.append(parents)

    def parent_of_each(self, starts_above: torch.Tensor) -> torch.Tensor:
        """Parent of each candidate among all of them, -1 for the root: (B, C)."""
        parents = torch.cat(self.parents, dim=1) + starts_above
        return parents[..., None].expand(-1, -1, self.tokens[0].shape[1]).flatten(1)

    def places(self) -> CandidatePlaces:
        """What the numbers of candidates say about each."""
        sizes = zip(self.tokens, self.parents, strict=True)
        return candidate_places(
            tuple((tokens.shape[1], parents.shape[1]) for tokens, parents in sizes), self.tokens[0].device
        )


def grow_tree(
    source: LevelSource,
    root_tokens: torch.Tensor,
    settings: DraftSettings,
    end_ids: frozenset[int] = frozenset(),
    max_depth: int | None = None,
) -> DraftTree:
    """Draft a tree below each row's last token.

    At every level the `tree_top_k` beams of highest cumulative probability are each expanded by their `tree_top_k`
    likeliest tokens; of all expanded nodes the `tree_size` best are kept, and a kept node's parent always is. With
    thresholds growth stops, and nodes are left out, where they are reached too rarely; it also stops where all beams end the
    text.

    Args:
        source (`LevelSource`): Makes the levels.
        root_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row, on the drafter's device.
        settings (`DraftSettings`): Size and thresholds of the tree, and the threads that grow it.
        end_ids (`frozenset[int]`): Tokens that end a text; below them nothing is drafted.
        max_depth (`int`, *optional*): Most levels that can be of use, 0 for the root alone; by default `tree_depth`.

    Returns:
        `DraftTree`: At most `tree_size` nodes and the root.
    """
    num_levels = settings.tree_depth if max_depth is None else min(max_depth, settings.tree_depth)
    if num_levels < 1:
        return DraftTree.chain(root_tokens)
    with phase(GROWTH), cpu_threads(settings.draft_threads):
        found = _expand_levels(
            source, settings, num_levels, lambda level, depth: _promising(level, depth, settings, end_ids)
        )
        return _best_tree(found, root_tokens, settings, found.places())


def grow_whole_tree(
    source: LevelSource, root_tokens: torch.Tensor, settings: DraftSettings, places: CandidatePlaces
) -> DraftTree:
    """The tree of [`grow_tree`] with all of its levels and nodes, as a function of tensors that nobody looks at on the way.

    `places` are [`whole_places`].
    """
    found = _expand_levels(
        source, settings, settings.tree_depth, lambda level, depth: list(range(settings.tree_top_k))
    )
    return _best_tree(found, root_tokens, settings, places)


def whole_places(settings: DraftSettings, device: torch.device) -> CandidatePlaces:
    """The places of all candidates of a tree of which every level is whole."""
    top_k = settings.tree_top_k
    return candidate_places(((top_k, 1), *[(top_k**2, top_k)] * (settings.tree_depth - 1)), device)


def _expand_levels(
    source: LevelSource, settings: DraftSettings, num_levels: int, promising_of: Callable[[Any, int], list[int]]
) -> _Candidates:
    """All nodes found on the way down, level by level; `promising_of` says which of a level, at a depth, to expand."""
    found, top_k = _Candidates(), settings.tree_top_k
    level = source.first_level(num_levels, top_k)
    found.add(level, torch.full_like(level.tokens[:, :1], -1))
    for depth in range(1, num_levels):
        promising = promising_of(level, depth)
        if not promising:
            break
        best = level.best
        level = source.next_level(level, promising, depth, top_k)
        is_whole = level.tokens.shape[1] == best.shape[1] * top_k  # the others are in it, with no probability
        found.add(level, best if is_whole else best[:, index_of(promising)])
    source.forget_levels()
    return found


def _best_tree(
    found: _Candidates, root_tokens: torch.Tensor, settings: DraftSettings, places: CandidatePlaces
) -> DraftTree:
    """Keep the `tree_size` best candidates, in the order they were found, so that parents come first."""
    num_nodes, num_levels = settings.tree_size, len(found.tokens)
    log_probs = torch.cat(found.scores, dim=1)
    scores = log_probs - places.prices
    if settings.tree_min_node_probability:
        is_likely = log_probs >= math.log(settings.tree_min_node_probability)
        # Whatever the levels: behind the likely.
        scores = torch.where(is_likely, scores, scores - LEVEL_PRICE * num_levels)
        if not crossings.reads_wait(log_probs.device):
            num_nodes = min(max(int(is_likely.sum(-1).max()), 1), num_nodes)
    chosen = scores.topk(min(num_nodes, scores.shape[1]), dim=-1).indices.sort(dim=-1).values
    tokens = torch.cat(found.tokens, dim=1)
    parents = found.parent_of_each(places.starts_above)
    return kept_tree(root_tokens, tokens, parents, log_probs, chosen, num_levels)


def kept_tree(
    root_tokens: torch.Tensor,
    tokens: torch.Tensor,
    parents: torch.Tensor,
    log_probs: torch.Tensor,
    chosen: torch.Tensor,
    num_levels: int,
) -> DraftTree:
    """The tree of some of C candidates, of which each comes after its parent.

    Args:
        root_tokens (`torch.LongTensor` of shape `(B, 1)`): The last token of each row.
        tokens (`torch.LongTensor` of shape `(B, C)`): Tokens of the candidates.
        parents (`torch.LongTensor` of shape `(B, C)`): Their parents among them, -1 for the root.
        log_probs (`torch.Tensor` of shape `(B, C)`): Log-probabilities of the paths to them.
        chosen (`torch.LongTensor` of shape `(B, N)`): Which to keep, rising; parents of those among them.
        num_levels (`int`): Levels at most.
    """
    # Node index of every candidate: 0 for the root, kept at the end so that parent -1 finds it.
    num_candidates = tokens.shape[1]
    nodes = torch.zeros(chosen.shape[0], num_candidates + 1, dtype=torch.long, device=chosen.device)
    nodes.scatter_(1, chosen, torch.arange(1, chosen.shape[1] + 1, device=chosen.device).expand_as(chosen))
    above = nodes.gather(1, parents.gather(1, chosen) % nodes.shape[1])
    tree = DraftTree.from_parents(
        torch.cat([root_tokens, tokens.gather(1, chosen)], dim=1),
        torch.cat([torch.zeros_like(root_tokens), above], dim=1),
        num_levels,
    )
    return replace(tree, log_probs=torch.nn.functional.pad(log_probs.gather(1, chosen), (1, 0)))


@lru_cache(maxsize=64)
def candidate_places(sizes: tuple[tuple[int, int], ...], device: torch.device) -> CandidatePlaces:
    """The places of candidates in levels of so many (candidates, parents)."""
    prices = [LEVEL_PRICE * level for level, (size, _) in enumerate(sizes) for _ in range(size)]
    starts, above = [0] * sizes[0][1], 0
    for (num_above, _), (_, num_parents) in pairwise(sizes):
        starts += [above] * num_parents
        above += num_above
    return CandidatePlaces(torch.tensor(prices, device=device), torch.tensor(starts, device=device))


def _promising(level: Level, depth: int, settings: DraftSettings, end_ids: frozenset[int]) -> list[int]:
    """Which of the best nodes to expand: none where they are reached too rarely together, or all of them end the text.

    A node that every row would leave out, with all that is below it, is not worth it. An accelerator waits for whatever is
    read from it: there all nodes of a level are expanded or none, and only one level in `LOOK_EVERY` is looked at, if at all.
    """
    min_level, min_node = settings.tree_min_level_probability, settings.tree_min_node_probability
    if crossings.reads_wait(level.scores.device):
        everything = list(range(level.best.shape[1]))
        if not (min_level or min_node) or depth % LOOK_EVERY:
            return everything
        probabilities = level.best_scores.exp()
        goes_on = (probabilities.sum(-1) >= min_level) & (probabilities.amax(-1) >= min_node)
        return everything if bool(goes_on.any()) else []
    rows = [
        [0.0 if token in end_ids else math.exp(score) for token, score in zip(*row, strict=True)]
        for row in zip(level.best_tokens.tolist(), level.best_scores.tolist(), strict=True)
    ]
    if max(sum(row) for row in rows) < min_level:
        return []
    return [
        place for place, values in enumerate(zip(*rows, strict=True)) if (best := max(values)) and best >= min_node
    ]
