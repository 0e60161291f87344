"""What is measured for a tuning: round by round, each kept in a journal when it is complete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tqdm.auto import tqdm

from ...drafters.dream.drafter import DreamDrafter
from ..measure import Measurement, measure
from ..runner import Settings
from .choice import Shape, Space, StepCosts, Trace
from .costs import Point, measure_costs, time_points
from .journal import Journal
from .traces import trace_answer

NUM_TIMED = 3  # prompts whose steps are timed


@dataclass(frozen=True)
class Rounds:
    """All measurements of one tuning.

    Args:
        target (`PreTrainedModel`): The target.
        drafter (`DreamDrafter`): The drafter; not changed.
        inputs (`Sequence[Mapping]`): Prompts, encoded, one row each.
        settings (`Settings`): Temperatures, longest answer, seed.
        space (`Space`): Shapes to choose from.
        journal (`Journal`): Keeps what was measured.
    """

    target: Any
    drafter: DreamDrafter
    inputs: Sequence[Mapping[str, Any]]
    settings: Settings
    space: Space
    journal: Journal

    @property
    def timed(self) -> Sequence[Mapping[str, Any]]:
        """The prompts whose steps are timed one by one."""
        return self.inputs[:: max(len(self.inputs) // NUM_TIMED, 1)][:NUM_TIMED]

    def pick_draft_threads(self) -> int | None:
        """On a CPU, whether one thread drafts faster than all; the drafter's own setting elsewhere."""
        own = self.drafter.settings.draft_threads
        if self.target.device.type != "cpu" or torch.get_num_threads() == 1:
            return own
        points = [Point(current_shape(self.drafter), threads) for threads in dict.fromkeys([own, None, 1])]
        seconds = time_points(self.target, self.drafter, self.timed, points, "threads", self.journal)
        return min(points, key=seconds.__getitem__).draft_threads

    def costs(self, draft_threads: int | None) -> StepCosts:
        """What the parts of a step cost."""
        return measure_costs(self.target, self.drafter, self.timed, self.space, draft_threads, self.journal)

    def traces(self) -> dict[int, list[Trace]]:
        """Traces of all answers at all temperatures, by top-k."""
        traces: dict[int, list[Trace]] = {top_k: [] for top_k in self.space.top_ks}
        rounds = [
            (temperature, index) for temperature in self.settings.temperatures for index in range(len(self.inputs))
        ]
        for turn, each in enumerate(tqdm(rounds, desc="acceptance", unit="prompt")):
            found = self.journal.traces_once(f"trace {turn}", partial(self._trace, *each))
            for top_k, trace in (found or {}).items():
                traces[top_k].append(trace)
        if not any(traces.values()):
            raise ValueError("`prompts`: all answers are of a single token; use prompts with longer answers.")
        return traces

    def run_finalists(self, points: Sequence[Point]) -> dict[Point, list[Measurement]]:
        """Whole answers, all ways of decoding on one prompt before the next."""
        rounds = [
            (temperature, index) for index in range(len(self.inputs)) for temperature in self.settings.temperatures
        ]
        names = [f"finalists {turn}" for turn in range(len(rounds))]
        if self.journal.is_resumed and any(name not in self.journal for name in names):
            self._run_all(points, *rounds[0])  # what was measured before has warmed up another process
        found = [
            self.journal.once(name, partial(self._run_all, points, *rounds[turn], turn))
            for turn, name in enumerate(tqdm(names, desc="finalists", unit="round"))
        ]
        return {point: [Measurement.from_dict(runs[at]) for runs in found] for at, point in enumerate(points)}

    def _trace(self, temperature: float, index: int) -> dict[int, Trace] | None:
        torch.manual_seed(self.settings.seed + index)
        limit = self.settings.max_new_tokens
        return trace_answer(self.target, self.drafter, self.inputs[index], temperature, limit, self.space)

    def _run_all(self, points: Sequence[Point], temperature: float, index: int, turn: int = 0) -> list[dict[str, Any]]:
        """One answer by all ways of decoding, in an order that rotates: what `Measurement`s are made from."""
        runs = {}
        for place in range(len(points)):
            at = (place + turn) % len(points)
            torch.manual_seed(self.settings.seed + index)
            arguments = points[at].method(self.drafter).ready(temperature, self.settings.max_new_tokens)
            runs[at] = measure(self.target, self.inputs[index], arguments).to_dict()
        return [runs[at] for at in range(len(points))]


def current_shape(drafter: DreamDrafter) -> Shape:
    """The tree that a drafter has."""
    return Shape(**{name: getattr(drafter.settings, name) for name in Shape.__dataclass_fields__})
