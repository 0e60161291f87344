"""`run_benchmark`: measure, summarise, write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..data.prompts import PromptEncoder
from ..decoding.drafter import Drafter
from ..drafters.dream.drafter import DreamDrafter
from ..drafters.model.drafter import ModelDrafter
from .methods import Method
from .plots import write_plots
from .profiling import profile_steps, time_shares
from .provenance import describe_run
from .report import make_rows, write_results
from .runner import Settings, collect
from .tasks import Prompt

logger = logging.get_logger(__name__)

# What a benchmark that goes on must not differ in, beside its settings.
IDENTITY = ("machine", "target", "drafter", "assistant", "further", "versions")


def run_benchmark(
    target: Any,
    processor: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    output: str | Path,
    settings: Settings | None = None,
    *,
    num_share_prompts: int = 3,
    with_profile: bool = False,
    with_plots: bool = True,
    date: str | None = None,
) -> dict[str, Any]:
    """Compare ways of decoding on the same prompts, one prompt after the other.

    A stopped benchmark goes on where it was when it is started again with the same arguments.

    Args:
        target (`PreTrainedModel`): The target.
        processor: Its processor.
        methods (`Sequence[Method]`): From [`make_methods`]; the first is what the others are compared with.
        prompts (`Sequence[Prompt]`): From [`load_prompts`], of one or more tasks.
        output (`str` or `Path`): Folder for `results.json`, `results.md`, `samples.jsonl` and plots.
        settings (`Settings`, *optional*): Temperatures, lengths, seed.
        num_share_prompts (`int`): Prompts decoded once more, greedily, to see where the time goes; 0 for none.
        with_profile (`bool`): Also split one step into its parts and write a profiler trace.
        with_plots (`bool`): Draw PNG plots.
        date (`str`, *optional*): For the results; today's by default.

    Returns:
        `dict`: What `results.json` holds: `provenance`, `rows`, `overall`, `failed_methods`, `profile`.

    Raises:
        ValueError: No prompts, a value out of range, or an `output` begun with other settings.
    """
    settings, output = settings or Settings(), Path(output).expanduser()
    keys = _keys(prompts)
    provenance = describe_run(target, *_models_of(methods), date=date)
    identity = {**{name: provenance[name] for name in IDENTITY}, "prompts": keys}
    samples = collect(target, processor, methods, prompts, settings, identity, output)
    rows, overall = make_rows(samples, methods[0].name)
    drafting = {method.name: dict(method.drafting) for method in methods}
    for row in [*rows, *overall]:
        row["drafting"] = drafting[row["method"]]
    working = [method for method in methods if method.name not in samples.failures]
    _add_shares(rows, target, PromptEncoder(processor), working, prompts, settings, num_share_prompts)
    said = ("seed", "max_new_tokens", "num_warmup", "batch_size", "repeats")
    results = {
        "provenance": {**provenance, **{name: getattr(settings, name) for name in said}},
        "rows": rows,
        "overall": overall,
        "failed_methods": samples.failures,
        "profile": _profile(target, processor, working, prompts[0], settings, output) if with_profile else None,
    }
    write_results(results, output)
    if with_plots:
        write_plots(results, output)
    return results


def _keys(prompts: Sequence[Prompt]) -> list[tuple[str, int]]:
    """Task and row of every prompt, each once."""
    if not prompts:
        raise ValueError("`prompts` is empty; load some with `load_prompts`.")
    keys = [(prompt.task, prompt.index) for prompt in prompts]
    if len(set(keys)) < len(keys):
        raise ValueError("`prompts` holds a prompt twice; were two tasks given the same name?")
    return keys


def _models_of(methods: Sequence[Method]) -> tuple[DreamDrafter | None, Any, dict[str, Drafter]]:
    """The drafter and the assistant among the methods' arguments, and further drafters by name."""
    models = [method.arguments.get("assistant_model") for method in methods if not method.is_further]
    drafters = [model for model in models if isinstance(model, DreamDrafter)]
    others = [model for model in models if model is not None and not isinstance(model, Drafter)]
    others += [model.model.model for model in models if isinstance(model, ModelDrafter)]
    further = {method.name: method.arguments["assistant_model"] for method in methods if method.is_further}
    return next(iter(drafters), None), next(iter(others), None), further


def _add_shares(
    rows: list[dict[str, Any]],
    target: Any,
    encoder: PromptEncoder,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    settings: Settings,
    num_prompts: int,
) -> None:
    """Give the greedy rows `time_shares`, from the first prompts of each task; the others have None."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    named = {method.name: method for method in methods}
    for row in rows:
        row["time_shares"] = None
        if row["temperature"] == 0 and num_prompts and row["method"] in named:
            chosen = by_task[row["task"]][:num_prompts]
            try:
                row["time_shares"] = time_shares(
                    target, encoder, named[row["method"]], chosen, settings.max_new_tokens
                )
            except Exception as error:  # hooks and a compiled forward, for one, may not go together
                logger.warning(f"No time shares of {row['method']}: {type(error).__name__}: {error}")


def _profile(
    target: Any, processor: Any, methods: Sequence[Method], prompt: Prompt, settings: Settings, output: Path
) -> dict[str, Any]:
    """Steps of the first tree and chain methods, taken apart."""
    parts = {}
    for method in methods:
        if isinstance(method.arguments.get("assistant_model"), DreamDrafter) and not method.name.count(" "):
            trace = output / f"trace_{method.name}.json"
            parts[method.name] = profile_steps(
                target, PromptEncoder(processor), method, prompt, settings.max_new_tokens, trace
            )
    return parts
