"""`tune`: the tree, and the point below which not to draft, that are fastest on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ...data.prompts import PromptEncoder
from ...drafters.dream.drafter import DreamDrafter
from ..measure import Measurement, measure
from ..provenance import describe_run
from ..runner import Settings
from ..tasks import Prompt
from .choice import Forecast, Shape, Space, StepCosts, Trace, pick_finalists, rank_shapes
from .costs import Point, measure_costs, time_points
from .journal import Journal
from .store import machine_name
from .traces import trace_answer

logger = logging.get_logger(__name__)

NUM_TIMED = 3  # prompts whose steps are timed
NUM_LISTED = 10  # shapes in the report
NUM_FINALISTS = 2, 3  # shapes without and with thresholds that run end to end
Inputs = Mapping[str, Any]


def tune(
    target: Any,
    processor: Any,
    drafter: DreamDrafter,
    prompts: Sequence[Prompt],
    settings: Settings | None = None,
    space: Space | None = None,
    date: str | None = None,
    output: str | Path | None = None,
) -> dict[str, Any]:
    """Find the settings of a drafter that give most tokens per second on this machine, one prompt at a time.

    Three parts: what steps cost, from steps of `generate()` with trees of different shapes; what trees catch, from full
    trees below every token of the target's answers; and the shapes that should be fastest by these two, run end to end
    beside plain decoding and the settings the drafter has, prompt by prompt. The fastest of those is the result.

    Args:
        target (`PreTrainedModel`): The target.
        processor: Its processor.
        drafter (`DreamDrafter`): The drafter; not changed, see [`apply_tuning`].
        prompts (`Sequence[Prompt]`): From [`load_prompts`]; a few of each kind to come.
        settings (`Settings`, *optional*): Temperatures, all of which count alike, longest answer, seed.
        space (`Space`, *optional*): Shapes to choose from.
        date (`str`, *optional*): For the result; today's by default.
        output (`str` or `Path`, *optional*): Folder that keeps what has been measured, in `tuning/`: a stopped tuning goes on
            when it is started again with the same arguments.

    Returns:
        `dict`: `machine`; `settings` for the drafter's config; `speeds` measured with them; `measured`, what ran end to end;
        `predicted`, the best shapes by forecast; `costs` of a step's parts; `provenance`.

    Raises:
        ValueError: No prompts, a value out of range, answers too short to time anything, or an `output` begun with other
            arguments.
    """
    settings, space = settings or Settings(), _fitting(space or Space(), drafter)
    settings.check()
    if not prompts:
        raise ValueError("`prompts` is empty; load some with `load_prompts`.")
    if settings.batch_size != 1:
        raise ValueError(f"`batch_size` ({settings.batch_size}) must be 1: trees are tuned for one prompt at a time.")
    encoder = PromptEncoder(processor)
    inputs = [encoder.encode([(prompt.messages, prompt.images)]) for prompt in prompts]
    timed = inputs[:: max(len(inputs) // NUM_TIMED, 1)][:NUM_TIMED]
    provenance = describe_run(target, drafter, date=date)
    journal = _journal(output, provenance, prompts, settings, space)
    draft_threads = _pick_draft_threads(target, drafter, timed, journal)
    costs = measure_costs(target, drafter, timed, space, draft_threads, journal)
    traces = _trace(target, drafter, inputs, settings, space, journal)
    ranking = rank_shapes(space, traces, costs)
    shapes = pick_finalists(ranking, *NUM_FINALISTS)
    current = _current_shape(drafter)
    points = [Point(None), *(Point(shape, draft_threads) for shape in dict.fromkeys([current, *shapes]))]
    measured = _summarize(_run_finalists(target, drafter, inputs, settings, points, journal))
    best = min((row for row in measured if row["settings"]), key=lambda row: row["ms_per_token"])
    plain = measured[0]
    if best["ms_per_token"] >= plain["ms_per_token"]:
        logger.warning("Plain decoding was faster than every tree. With `pause_below` the drafter will mostly rest.")
    return {
        "machine": machine_name(provenance["machine"]),
        "settings": {**best["settings"], "pause_below": round(best["step_ms"] / plain["step_ms"], 2)},
        "speeds": _speeds(best, plain, provenance),
        "measured": measured,
        "predicted": [_row(each) for each in ranking[:NUM_LISTED]],
        "costs": _cost_table(costs),
        "provenance": {**provenance, **asdict(settings), "num_prompts": len(prompts)},
    }


def _journal(
    output: str | Path | None,
    provenance: Mapping[str, Any],
    prompts: Sequence[Prompt],
    settings: Settings,
    space: Space,
) -> Journal:
    """Keeps what is measured, if there is a folder for it."""
    if output is None:
        return Journal()
    identity = {name: provenance[name] for name in ("machine", "target", "drafter", "versions")}
    asked = [(prompt.task, prompt.index) for prompt in prompts]
    return Journal(
        Path(output).expanduser(), {**asdict(settings), "space": asdict(space), **identity, "prompts": asked}
    )


def _fitting(space: Space, drafter: DreamDrafter) -> Space:
    """The space without more beams than there are tokens to draft."""
    config = drafter.config
    vocabulary = config.draft_vocab_size or config.vocab_size
    return Space(**{**asdict(space), "top_ks": tuple(k for k in space.top_ks if k <= vocabulary)})


def _current_shape(drafter: DreamDrafter) -> Shape:
    return Shape(**{name: getattr(drafter.settings, name) for name in Shape.__dataclass_fields__})


def _pick_draft_threads(target: Any, drafter: DreamDrafter, timed: Sequence[Inputs], journal: Journal) -> int | None:
    """On a CPU, whether one thread drafts faster than all; the drafter's own setting elsewhere."""
    own = drafter.settings.draft_threads
    if target.device.type != "cpu" or torch.get_num_threads() == 1:
        return own
    points = [Point(_current_shape(drafter), threads) for threads in dict.fromkeys([own, None, 1])]
    seconds = time_points(target, drafter, timed, points, "threads", journal)
    return min(points, key=seconds.__getitem__).draft_threads


def _trace(
    target: Any, drafter: DreamDrafter, inputs: Sequence[Inputs], settings: Settings, space: Space, journal: Journal
) -> dict[int, list[Trace]]:
    """Traces of all answers at all temperatures, by top-k."""
    traces: dict[int, list[Trace]] = {top_k: [] for top_k in space.top_ks}
    rounds = [(temperature, index) for temperature in settings.temperatures for index in range(len(inputs))]

    def trace(temperature: float, index: int) -> dict[int, Trace] | None:
        torch.manual_seed(settings.seed + index)
        return trace_answer(target, drafter, inputs[index], temperature, settings.max_new_tokens, space)

    for turn, each in enumerate(tqdm(rounds, desc="acceptance", unit="prompt")):
        found = journal.traces_once(f"trace {turn}", partial(trace, *each))
        for top_k, one in (found or {}).items():
            traces[top_k].append(one)
    if not any(traces.values()):
        raise ValueError("`prompts`: all answers are of a single token; use prompts with longer answers.")
    return traces


def _run_finalists(
    target: Any,
    drafter: DreamDrafter,
    inputs: Sequence[Inputs],
    settings: Settings,
    points: Sequence[Point],
    journal: Journal,
) -> dict[Point, list[Measurement]]:
    """Whole answers, all ways of decoding on one prompt before the next, in an order that rotates."""
    rounds = [(temperature, index) for index in range(len(inputs)) for temperature in settings.temperatures]
    found: list[list[Measurement]] = []
    with tqdm(total=len(rounds) * len(points), desc="finalists", unit="run") as progress:

        def run_all(turn: int) -> list[dict[str, Any]]:
            (temperature, index), runs = rounds[turn], {}
            for place in range(len(points)):
                at = (place + turn) % len(points)
                torch.manual_seed(settings.seed + index)
                arguments = points[at].method(drafter).ready(temperature, settings.max_new_tokens)
                runs[at] = measure(target, inputs[index], arguments).to_dict()
                progress.update()
            return [runs[at] for at in range(len(points))]

        for turn in range(len(rounds)):
            runs = journal.once(f"finalists {turn}", partial(run_all, turn))
            found.append([Measurement.from_dict(run) for run in runs])
    return {point: list(runs) for point, runs in zip(points, zip(*found, strict=True), strict=True)}


def _summarize(runs: Mapping[Point, Sequence[Measurement]]) -> list[dict[str, Any]]:
    """A row for each way of decoding, plain decoding first: milliseconds of decoding per token and per step, tau."""
    rows: list[dict[str, Any]] = []
    for point, measurements in runs.items():
        seconds = sum(run.seconds - run.first_token_seconds for run in measurements)
        num_tokens = sum(run.num_tokens - run.num_first_tokens for run in measurements)
        num_steps = sum(len(run.gains) for run in measurements)
        shape = point.shape
        row = {
            "name": "plain" if shape is None else str(shape),
            "settings": None if shape is None else {**shape.settings(), "draft_threads": point.draft_threads},
            "ms_per_token": 1e3 * seconds / num_tokens,
            "step_ms": 1e3 * seconds / num_steps,
            "tau": num_tokens / num_steps,
        }
        rows.append(row)
    for row in rows:
        row["speedup_decode"] = rows[0]["ms_per_token"] / row["ms_per_token"]
    return rows


def _speeds(best: Mapping[str, Any], plain: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept with the settings."""
    return {
        "tokens_per_second": round(1e3 / best["ms_per_token"], 2),
        "plain_tokens_per_second": round(1e3 / plain["ms_per_token"], 2),
        "step_ms": round(best["step_ms"], 3),
        "plain_step_ms": round(plain["step_ms"], 3),
        "tau": round(best["tau"], 3),
        "dtype": provenance["target"]["dtype"],
        "date": provenance["date"],
    }


def _row(each: Forecast) -> dict[str, Any]:
    return {
        "name": str(each.shape),
        "settings": each.shape.settings(),
        "ms_per_token": 1e3 * each.seconds_per_token,
        "tau": each.tau,
    }


def _cost_table(costs: StepCosts) -> dict[str, Any]:
    """Costs in milliseconds."""
    return {
        "plain_step_ms": 1e3 * costs.plain,
        "smallest_drafted_step_ms": 1e3 * costs.base,
        "further_level_ms": {top_k: 1e3 * seconds for top_k, seconds in sorted(costs.level.items())},
        "verifying_nodes_ms": {size: 1e3 * seconds for size, seconds in costs.nodes},
        "level_check_ms": 1e3 * costs.level_check,
        "node_check_ms": 1e3 * costs.node_check,
    }
