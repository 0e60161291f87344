"""`tune`: the tree, and the point below which not to draft, that are fastest on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...data.prompts import PromptEncoder
from ...drafters.dream.drafter import DreamDrafter
from ..measure import Measurement
from ..provenance import describe_run
from ..runner import Settings
from ..tasks import Prompt
from .choice import Forecast, Space, StepCosts, pick_finalists, rank_shapes
from .costs import Point
from .journal import Journal
from .rounds import Rounds, current_shape
from .store import machine_name

logger = logging.get_logger(__name__)

NUM_LISTED = 10  # shapes in the report
NUM_FINALISTS = 2, 3  # shapes without and with thresholds that run end to end


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
    _check(prompts, settings)
    encoder = PromptEncoder(processor)
    inputs = [encoder.encode([(prompt.messages, prompt.images)]) for prompt in prompts]
    provenance = describe_run(target, drafter, date=date)
    identity = {name: provenance[name] for name in ("machine", "target", "drafter", "versions")}
    identity |= {**asdict(settings), "space": asdict(space), "prompts": [(each.task, each.index) for each in prompts]}
    journal = Journal(None if output is None else Path(output).expanduser(), identity)
    rounds = Rounds(target, drafter, inputs, settings, space, journal)
    draft_threads = rounds.pick_draft_threads()
    costs = rounds.costs(draft_threads)
    ranking = rank_shapes(space, rounds.traces(), costs)
    shapes = [current_shape(drafter), *pick_finalists(ranking, *NUM_FINALISTS)]
    points = [Point(None), *(Point(shape, draft_threads) for shape in dict.fromkeys(shapes))]
    measured = _summarize(rounds.run_finalists(points))
    return {
        **_found(measured, provenance),
        "measured": measured,
        "predicted": [_row(each) for each in ranking[:NUM_LISTED]],
        "costs": _cost_table(costs),
        "provenance": {**provenance, **asdict(settings), "num_prompts": len(prompts)},
    }


def _check(prompts: Sequence[Prompt], settings: Settings) -> None:
    settings.check()
    if not prompts:
        raise ValueError("`prompts` is empty; load some with `load_prompts`.")
    if settings.batch_size != 1:
        raise ValueError(f"`batch_size` ({settings.batch_size}) must be 1: trees are tuned for one prompt at a time.")


def _fitting(space: Space, drafter: DreamDrafter) -> Space:
    """The space without more beams than there are tokens to draft."""
    config = drafter.config
    vocabulary = config.draft_vocab_size or config.vocab_size
    return Space(**{**asdict(space), "top_ks": tuple(k for k in space.top_ks if k <= vocabulary)})


def _found(measured: Sequence[Mapping[str, Any]], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest settings of those that ran, plain decoding first among them, and what they are worth on which machine."""
    plain = measured[0]
    best = min((row for row in measured if row["settings"]), key=lambda row: row["ms_per_token"])
    if best["ms_per_token"] >= plain["ms_per_token"]:
        logger.warning("Plain decoding was faster than every tree. With `pause_below` the drafter will mostly rest.")
    return {
        "machine": machine_name(provenance["machine"]),
        "settings": {**best["settings"], "pause_below": round(best["step_ms"] / plain["step_ms"], 2)},
        "speeds": _speeds(best, plain, provenance),
    }


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
