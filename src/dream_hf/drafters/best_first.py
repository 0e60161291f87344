"""The most probable nodes below a text's last token, best first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Generic, TypeVar

import torch

from ..decoding.settings import DraftSettings
from ..decoding.tree import DraftTree

State = TypeVar("State")  # what a source of tokens knows of a node
# From the state of a node's parent, the node's token (None for the root) and the smallest probability that is of use to the
# node's own state and what may follow it, best first.
Following = Callable[[State, int | None, float], tuple[State, Sequence[tuple[int, float]]]]


@dataclass
class Nodes:
    """Drafted nodes of one row. Node 0, the root, is not among them: entry i is node i + 1."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)  # of the path from the root

    def add(self, token: int, parent: int, depth: int, probability: float) -> int:
        """Add a node; returns its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth)
        self.probabilities.append(probability)
        return len(self.tokens)

    def above(self, depth: int) -> Nodes:
        """The nodes down to a depth."""
        numbers, kept = {0: 0}, Nodes()
        for number, node in enumerate(zip(self.tokens, self.parents, self.depths, self.probabilities, strict=True), 1):
            token, parent, level, probability = node
            if level <= depth:
                numbers[number] = kept.add(token, numbers[parent], level, probability)
        return kept


@dataclass
class _Growth(Generic[State]):
    """A tree in the making, and the candidates at its edge: (-probability, number, token, parent, depth, state above)."""

    following: Following[State]
    settings: DraftSettings
    nodes: Nodes = field(default_factory=Nodes)
    edge: list[tuple[float, int, int, int, int, State]] = field(default_factory=list)
    num_found: int = 0

    def expand(self, state: State, token: int | None, parent: int, depth: int, probability: float) -> None:
        """Put what may follow `parent`, which has `token` and lies at `depth`, at the edge."""
        min_share = self.settings.tree_min_node_probability / probability
        state, likeliest = self.following(state, token, min_share)
        for follower, share in likeliest[: self.settings.tree_top_k]:
            reached = probability * share
            if not reached or reached < self.settings.tree_min_node_probability:
                break
            self.num_found += 1  # of equally probable ones the first comes first, and states are never compared
            heappush(self.edge, (-reached, self.num_found, follower, parent, depth + 1, state))


def best_nodes(
    following: Following[State],
    state: State,
    settings: DraftSettings,
    max_depth: int,
    end_ids: frozenset[int] = frozenset(),
) -> Nodes:
    """The `tree_size` most probable nodes within `max_depth`, each with `tree_top_k` children at most.

    Args:
        following (`Following`): What may follow a node.
        state: What the root starts from.
        settings (`DraftSettings`): Size and thresholds.
        max_depth (`int`): Levels at most.
        end_ids (`frozenset[int]`): Tokens below which nothing is drafted.
    """
    growth = _Growth(following, settings)
    nodes = growth.nodes
    if max_depth > 0:
        growth.expand(state, None, 0, 0, 1.0)
    while growth.edge and len(nodes.tokens) < settings.tree_size:
        negative, _, token, parent, depth, above = heappop(growth.edge)
        node = nodes.add(token, parent, depth, -negative)
        if depth < max_depth and token not in end_ids:
            growth.expand(above, token, node, depth, -negative)
    return _without_rare_levels(nodes, settings.tree_min_level_probability)


def _without_rare_levels(nodes: Nodes, min_probability: float) -> Nodes:
    """The nodes down to the first level that is reached with less than this probability."""
    if not min_probability:
        return nodes
    levels: dict[int, float] = {}
    for depth, probability in zip(nodes.depths, nodes.probabilities, strict=True):
        levels[depth] = levels.get(depth, 0.0) + probability
    rare = [depth for depth, probability in levels.items() if probability < min_probability]
    return nodes.above(min(rare)) if rare else nodes


def tree_of(root_tokens: torch.Tensor, rows: Sequence[Nodes]) -> DraftTree:
    """One tree below each root (B, 1). Rows with fewer nodes are filled up with copies of the root below it, never reached."""
    most, device = max(len(row.tokens) for row in rows), root_tokens.device
    roots = root_tokens[:, 0].tolist()
    missing = [most - len(row.tokens) for row in rows]
    tokens = [[root, *row.tokens, *[root] * n] for root, row, n in zip(roots, rows, missing, strict=True)]
    parents = [[0, *row.parents, *[0] * n] for row, n in zip(rows, missing, strict=True)]
    log_probs = [[0.0, *map(_log, row.probabilities), *[-math.inf] * n] for row, n in zip(rows, missing, strict=True)]
    deepest = max((depth for row in rows for depth in row.depths), default=0)
    tree = DraftTree.from_parents(torch.tensor(tokens, device=device), torch.tensor(parents, device=device), deepest)
    return replace(tree, log_probs=torch.tensor(log_probs, device="cpu"))


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf
