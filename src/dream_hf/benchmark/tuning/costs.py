"""What decoding steps cost on this machine, from steps of `generate()` itself with trees of different shapes."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ...data.prompts import on_model
from ...drafters.dream.drafter import DreamDrafter
from ..measure import Clock, synchronize
from ..methods import Method
from .choice import Shape, Space, StepCosts, num_candidates
from .journal import Journal

STEPS_PER_RUN = 12
NEVER = 1e-30  # a threshold that is asked about and never met
FEW_NODES = 8


@dataclass(frozen=True)
class Point:
    """A way of decoding whose steps are timed: a tree, or none."""

    shape: Shape | None
    draft_threads: int | None = None

    def method(self, drafter: DreamDrafter) -> Method:
        """As arguments of `generate()`; nothing pauses."""
        if self.shape is None:
            return Method("plain")
        drafting = {**self.shape.settings(), "draft_threads": self.draft_threads, "pause_below": 0.0}
        return Method(str(self.shape), {"assistant_model": drafter, "return_dict_in_generate": True}, drafting)


def time_points(
    target: Any,
    drafter: DreamDrafter,
    prompts: Sequence[Mapping[str, Any]],
    points: Sequence[Point],
    title: str,
    journal: Journal | None = None,
) -> dict[Point, float]:
    """Median seconds per step of each point, all of them on one prompt before the next; the first prompt warms up.

    Args:
        target (`PreTrainedModel`): The target.
        drafter (`DreamDrafter`): The drafter.
        prompts (`Sequence[Mapping]`): Encoded, one row each.
        points (`Sequence[Point]`): What to time.
        title (`str`): For the progress bar and the journal.
        journal (`Journal`, *optional*): Keeps what was timed, prompt by prompt.
    """
    journal = journal or Journal()
    names = [f"{title} {turn}" for turn in range(len(prompts))]
    with tqdm(total=(len(prompts) + 1) * len(points), desc=title, unit="run") as progress:

        def time_all(inputs: Mapping[str, Any], turn: int) -> list[list[float]]:
            """Seconds of each point's steps on one prompt, timed in an order that rotates."""
            gc.collect()
            seconds: dict[int, list[float]] = {}
            for place in range(len(points)):
                index = (place + turn) % len(points)
                seconds[index] = step_seconds(target, inputs, points[index].method(drafter))
                progress.update()
            return [seconds[index] for index in range(len(points))]

        if any(name not in journal for name in names):
            time_all(prompts[0], 0)
        rounds = [
            journal.once(name, partial(time_all, inputs, turn))
            for turn, (name, inputs) in enumerate(zip(names, prompts, strict=True), start=1)
        ]
    times = {point: [value for seconds in rounds for value in seconds[index]] for index, point in enumerate(points)}
    silent = [str(point.shape or "plain") for point, seconds in times.items() if not seconds]
    if silent:
        raise ValueError(
            f"`prompts`: their answers are over before a step of {silent} could be timed; use prompts with longer answers."
        )
    return {point: median(seconds) for point, seconds in times.items()}


def step_seconds(target: Any, inputs: Mapping[str, Any], method: Method) -> list[float]:
    """Seconds of single greedy steps, but for the first one, which also sets things up, and the last one, which ends."""
    clock = Clock()
    inputs = on_model(inputs, target)
    depth = method.drafting.get("tree_depth", 0)
    limit = STEPS_PER_RUN * (1 + min(depth, 4)) + 1
    arguments = method.ready(0.0, limit)
    synchronize(target.device)
    output = target.generate(**inputs, **arguments, streamer=clock)
    num_tokens = len(clock.times) - 1  # the first entry is the prompt
    gains = [1] * (num_tokens - 1)
    if not isinstance(output, torch.Tensor):
        gains = [gain for gain in output.accepted_lengths[0].tolist() if gain > 0]
    ends = np.cumsum([1, *gains])  # the entry of each step's last token
    times = np.array(clock.times)[ends]
    return np.diff(times)[1:-1].tolist()


def measure_costs(
    target: Any,
    drafter: DreamDrafter,
    prompts: Sequence[Mapping[str, Any]],
    space: Space,
    draft_threads: int | None = None,
    journal: Journal | None = None,
) -> StepCosts:
    """Time steps with trees of few and many levels, and of few and many nodes, and tell the parts apart."""
    wide, deep = max(space.top_ks), space.max_depth
    by_level = [
        Shape(depth, top_k, min(max(FEW_NODES, depth), num_candidates(depth, top_k)))
        for top_k in space.top_ks
        for depth in sorted({min(2, deep), deep})
    ]
    num_levels = min(2, deep)
    most = num_candidates(num_levels, wide)
    while most < max(space.sizes) and num_levels < deep:
        num_levels += 1
        most = num_candidates(num_levels, wide)
    by_size = [Shape(num_levels, wide, min(size, most)) for size in space.sizes]
    largest = Shape(deep, wide, min(max(space.sizes), num_candidates(deep, wide)))
    level_check = Shape(deep, wide, largest.tree_size, tree_min_level_probability=NEVER)
    node_check = Shape(deep, wide, largest.tree_size, tree_min_node_probability=NEVER)
    shapes = dict.fromkeys([*by_level, *by_size, largest, level_check, node_check])
    points = [Point(None), *(Point(shape, draft_threads) for shape in shapes)]
    seconds = time_points(target, drafter, prompts, points, "costs", journal)
    times = {point.shape: value for point, value in seconds.items() if point.shape is not None}
    return fit_costs(
        seconds[Point(None)],
        {shape: times[shape] for shape in by_level},
        {shape: times[shape] for shape in by_size},
        (times[level_check] - times[largest]) / max(deep - 1, 1),
        times[node_check] - times[largest],
    )


def fit_costs(
    plain: float,
    by_level: Mapping[Shape, float],
    by_size: Mapping[Shape, float],
    level_check: float = 0.0,
    node_check: float = 0.0,
) -> StepCosts:
    """Costs from seconds per step: of trees of different depths for every top-k, and of different sizes for one.

    More never costs less, and no step costs less than a plain one: what says so is noise, and smoothed away.
    """
    sizes = sorted((shape.tree_size, seconds) for shape, seconds in by_size.items())
    rising = _rising([seconds for _, seconds in sizes])
    nodes = [(size, value - rising[0]) for (size, _), value in zip(sizes, rising, strict=True)]
    drafting: dict[int, list[tuple[int, float]]] = {}  # by top-k: levels, and seconds without those of the nodes
    for shape, seconds in by_level.items():
        bare = seconds - float(np.interp(shape.tree_size, [size for size, _ in nodes], [added for _, added in nodes]))
        drafting.setdefault(shape.tree_top_k, []).append((shape.tree_depth, bare))
    slopes = {top_k: _slope(points) for top_k, points in sorted(drafting.items())}
    level = dict(zip(slopes, _rising(list(slopes.values())), strict=True))
    rest = [bare - level[top_k] * (depth - 1) for top_k, points in drafting.items() for depth, bare in points]
    return StepCosts(plain, max(median(rest), plain), level, nodes, max(level_check, 0.0), max(node_check, 0.0))


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """Seconds per level between the lowest and the deepest tree."""
    (low, few), (high, many) = min(points), max(points)
    return max((many - few) / (high - low), 0.0) if high > low else 0.0


def _rising(values: Sequence[float]) -> list[float]:
    """The nearest numbers that never fall: neighbours in the wrong order get their mean."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [mean(pool) for pool in pools for _ in pool]
