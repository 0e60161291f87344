"""Which tree gives most tokens per second: what steps cost and what trees catch in, the best shapes out. Pure functions.

T positions of an answer, D levels of the deepest tree, N nodes of the largest one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """A tree, by the names of [`DreamConfig`]."""

    tree_depth: int
    tree_top_k: int
    tree_size: int
    tree_min_level_probability: float = 0.0
    tree_min_node_probability: float = 0.0

    def __str__(self) -> str:
        thresholds = (self.tree_min_level_probability, self.tree_min_node_probability)
        name = f"{self.tree_depth}/{self.tree_top_k}/{self.tree_size}"
        return name + (f" level>={thresholds[0]:g} node>={thresholds[1]:g}" if any(thresholds) else "")

    def settings(self) -> dict[str, Any]:
        """Values for a drafter's config."""
        return asdict(self)


@dataclass(frozen=True)
class Space:
    """
    Shapes to choose from.

    Args:
        max_depth (`int`): Deepest tree.
        top_ks (`tuple[int]`): Beams per level.
        sizes (`tuple[int]`): Drafted nodes.
        level_probabilities, node_probabilities (`tuple[float]`): Thresholds, tried with the best shapes.
    """

    max_depth: int = 10
    top_ks: tuple[int, ...] = (1, 2, 3, 4, 6)
    sizes: tuple[int, ...] = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
    level_probabilities: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
    node_probabilities: tuple[float, ...] = (0.0, 0.003, 0.01, 0.03, 0.05, 0.1)

    def shapes(self) -> Iterator[Shape]:
        """All trees without thresholds that can be filled, and in which every level can be reached."""
        for top_k in self.top_ks:
            for depth in range(1, self.max_depth + 1):
                most = num_candidates(depth, top_k)
                for size in sorted({min(size, most) for size in self.sizes}):
                    if size >= depth:
                        yield Shape(depth, top_k, size)

    def refined(self, shape: Shape) -> Iterator[Shape]:
        """A shape, and the deepest one of its size, with thresholds."""
        for depth in sorted({shape.tree_depth, min(self.max_depth, shape.tree_size)}):
            for level in self.level_probabilities:
                for node in self.node_probabilities:
                    if level or node:
                        yield replace(
                            shape, tree_depth=depth, tree_min_level_probability=level, tree_min_node_probability=node
                        )


def num_candidates(depth: int, top_k: int) -> int:
    """Nodes that a tree of this depth expands."""
    return top_k + (depth - 1) * top_k * top_k


@dataclass(frozen=True)
class StepCosts:
    """
    Seconds that a decoding step takes, part by part.

    Args:
        plain (`float`): A step of plain decoding.
        base (`float`): A step with one level of drafting and as few nodes as `nodes` begins with.
        level (`Mapping[int, float]`): By top-k: each further level.
        nodes (`Sequence[tuple[int, float]]`): Drafted nodes and what verifying them adds, in rising order; in between
            it is interpolated.
        level_check (`float`): Asking whether a level promises enough.
        node_check (`float`): Counting the nodes that do.
    """

    plain: float
    base: float
    level: Mapping[int, float]
    nodes: Sequence[tuple[int, float]]
    level_check: float = 0.0
    node_check: float = 0.0

    def of_steps(self, shape: Shape, depths: np.ndarray, num_nodes: np.ndarray) -> np.ndarray:
        """Seconds of steps with trees of these depths (T,) and nodes (T,)."""
        sizes, added = zip(*self.nodes, strict=True)
        seconds = self.base + self.level[shape.tree_top_k] * (depths - 1) + np.interp(num_nodes, sizes, added)
        if shape.tree_min_level_probability:
            seconds = seconds + self.level_check * np.minimum(depths, shape.tree_depth - 1)
        return seconds + (self.node_check if shape.tree_min_node_probability else 0.0)


@dataclass(frozen=True)
class Trace:
    """
    What full trees of one top-k held at every position of an answer.

    Args:
        promise (`np.ndarray` of shape `(T, D)`): Probability of a level's beams together, as growth is judged by it.
        ranked (`np.ndarray` of shape `(T, D, N)`): Scores of the N best nodes of the first 1, 2, ... D levels, falling;
            -inf where there are fewer.
        path (`np.ndarray` of shape `(T, D)`): Scores of the nodes that hold the answer's next tokens; -inf from the first
            one on that no node holds.
        ranked_log_probs, path_log_probs (`np.ndarray`): Log-probabilities of these nodes, which thresholds look at: scores
            without the price of a node's level.
    """

    promise: np.ndarray
    ranked: np.ndarray
    path: np.ndarray
    ranked_log_probs: np.ndarray
    path_log_probs: np.ndarray


@dataclass(frozen=True)
class Forecast:
    """What a shape does on the traced answers."""

    shape: Shape
    seconds_per_token: float
    tau: float
    gains: list[list[int]]  # of every answer, as `accepted_lengths` would have them


def forecast(shape: Shape, traces: Mapping[int, Sequence[Trace]], costs: StepCosts) -> Forecast:
    """Decode all answers of `traces` (by top-k) with a shape: every step grows the tree traced at its position."""
    seconds, gains = 0.0, []
    for trace in traces[shape.tree_top_k]:
        depths, num_nodes, gained = _steps(shape, trace)
        step_seconds = costs.of_steps(shape, depths, num_nodes)
        at, row = 0, []
        while at < len(gained):
            row.append(min(int(gained[at]), len(gained) - at))
            seconds += float(step_seconds[at])
            at += row[-1]
        gains.append(row)
    num_tokens, num_steps = sum(map(sum, gains)), sum(map(len, gains))
    return Forecast(shape, seconds / num_tokens, num_tokens / num_steps, gains)


def rank_shapes(
    space: Space, traces: Mapping[int, Sequence[Trace]], costs: StepCosts, num_refined: int = 4
) -> list[Forecast]:
    """All shapes of a space, those with thresholds for the `num_refined` best without, the fastest first."""
    plain = _sorted(forecast(shape, traces, costs) for shape in space.shapes())
    seeds = [best.shape for best in plain[:num_refined]]
    refined = {shape for seed in seeds for shape in space.refined(seed)}
    return _sorted([*plain, *(forecast(shape, traces, costs) for shape in refined)])


def pick_finalists(ranking: Sequence[Forecast], num_plain: int, num_refined: int) -> list[Shape]:
    """The best shapes without and with thresholds, no two of them alike but for their thresholds."""
    found: dict[bool, list[Shape]] = {False: [], True: []}
    limits = {False: num_plain, True: num_refined}
    for each in ranking:
        shape = each.shape
        has_thresholds = bool(shape.tree_min_level_probability or shape.tree_min_node_probability)
        kind = found[has_thresholds]
        bare = (shape.tree_depth, shape.tree_top_k, shape.tree_size)
        is_new = all((other.tree_depth, other.tree_top_k, other.tree_size) != bare for other in kind)
        if len(kind) < limits[has_thresholds] and is_new:
            kind.append(shape)
    return [*found[False], *found[True]]


def _sorted(forecasts: Iterable[Forecast]) -> list[Forecast]:
    """The fastest first; of equals the smaller tree."""
    return sorted(forecasts, key=lambda each: (each.seconds_per_token, *each.shape.settings().values()))


def _steps(shape: Shape, trace: Trace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Depth, nodes and tokens gained of the trees at every position, (T,) each."""
    limit, rows = shape.tree_depth, np.arange(len(trace.path))
    depths = np.full(len(rows), limit)
    if shape.tree_min_level_probability and limit > 1:
        stops = trace.promise[:, : limit - 1] < shape.tree_min_level_probability
        depths = np.where(stops.any(1), stops.argmax(1) + 1, limit)
    ranked = trace.ranked[rows, depths - 1]  # (T, N)
    is_kept, is_caught = np.isfinite(ranked), np.isfinite(trace.path)
    if shape.tree_min_node_probability:
        least = math.log(shape.tree_min_node_probability)
        is_kept &= trace.ranked_log_probs[rows, depths - 1] >= least
        none = ~is_kept.any(1)
        is_kept[none, 0] = True  # a tree has one node at least: the best
        is_caught &= (trace.path_log_probs >= least) | none[:, None]
    is_kept &= np.cumsum(is_kept, axis=1) <= shape.tree_size
    num_nodes = np.maximum(is_kept.sum(1), 1)
    last = np.where(is_kept, ranked, np.inf).min(1)
    is_level = np.arange(1, trace.path.shape[1] + 1) <= depths[:, None]
    is_caught &= is_level & (trace.path >= last[:, None])
    return depths, num_nodes, np.cumprod(is_caught, axis=1).sum(1) + 1
