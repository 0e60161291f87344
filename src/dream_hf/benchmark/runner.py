"""Methods side by side: every prompt goes through all of them before the next, so that a noisy machine hurts all alike."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data.prompts import PromptEncoder
from ..regeneration.journal import append, begin_folder, cut_unfinished_line, entries
from .measure import Measurement, measure
from .methods import Method
from .tasks import Prompt

logger = logging.get_logger(__name__)

SAMPLES = "samples.jsonl"
Key = tuple[float, str, int]  # temperature, task, row of the task (of a batch, the first one's)
Batch = Sequence[Prompt]


@dataclass(frozen=True)
class Settings:
    """
    What measurements depend on besides the models.

    Args:
        temperatures (`tuple[float]`): 0 is greedy.
        max_new_tokens (`int`): Longest answer.
        num_warmup (`int`): Prompts each method runs before anything counts.
        seed (`int`): For sampling, the same for all methods on a prompt.
        batch_size (`int`): Prompts decoded together; methods that take one prompt only are then left out.
        repeats (`int`): Runs of each method on each prompt, in turns; figures are of each prompt's median run.
    """

    temperatures: tuple[float, ...] = (0.0, 1.0)
    max_new_tokens: int = 500
    num_warmup: int = 2
    seed: int = 42
    batch_size: int = 1
    repeats: int = 1

    def check(self) -> None:
        """Raise a `ValueError` for a value out of range."""
        for name, low in (("max_new_tokens", 2), ("num_warmup", 1), ("batch_size", 1), ("repeats", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least {low}.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"`temperatures` ({list(self.temperatures)}) must be one or more numbers, 0 or above.")


@dataclass
class Samples:
    """Repeated measurements by prompt and method, and why methods that could not run did not."""

    runs: dict[Key, dict[str, list[Measurement]]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def collect(
    target: Any,
    processor: Any,
    methods: Sequence[Method],
    prompts: Sequence[Prompt],
    settings: Settings,
    identity: Mapping[str, Any],
    output: Path,
) -> Samples:
    """Measure all methods on all prompts, batch by batch, going on with what `output` holds already.

    Args:
        target (`PreTrainedModel`): The target.
        processor: Its processor.
        methods (`Sequence[Method]`): The first is what the others are compared with.
        prompts (`Sequence[Prompt]`): Of one or more tasks.
        settings (`Settings`): How to run.
        identity (`Mapping`): What else `output` must have been begun with (models, machine).
        output (`Path`): A folder; measurements are appended to `samples.jsonl` in it, prompt by prompt.

    Raises:
        ValueError: `output` was begun with other settings, or plain decoding itself fails.
    """
    settings.check()
    names = [method.name for method in methods]
    begin_folder(output, {**asdict(settings), "methods": names, **identity})
    encoder = PromptEncoder(processor)
    samples = Samples(_read(output / SAMPLES))
    batches = make_batches(prompts, settings.batch_size)
    keys = [(t, batch) for t in settings.temperatures for batch in batches]
    missing = [(t, batch) for t, batch in keys if (t, batch[0].task, batch[0].index) not in samples.runs]
    working = _Working(list(methods), samples.failures)
    if missing:
        _warm_up(target, encoder, working, batches, settings)
    with tqdm(total=len(keys), initial=len(keys) - len(missing), desc="bench", unit="batch") as progress:
        for turn, (temperature, batch) in enumerate(missing):
            runs = _run_all(target, encoder, working, batch, temperature, settings, turn, settings.repeats)
            key = (temperature, batch[0].task, batch[0].index)
            samples.runs[key] = {name: runs[name] for name in names if len(runs.get(name, ())) == settings.repeats}
            _append(output / SAMPLES, key, samples.runs[key])
            progress.update()
    for method in names:
        if any(method not in runs for runs in samples.runs.values()):
            samples.failures.setdefault(method, "it failed before this was started again")
    for runs in samples.runs.values():
        for method in samples.failures:
            runs.pop(method, None)  # figures over some of the prompts would not compare
    return samples


def make_batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Prompts in batches of one task each."""
    by_task: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_task.setdefault(prompt.task, []).append(prompt)
    return [
        group[start : start + batch_size] for group in by_task.values() for start in range(0, len(group), batch_size)
    ]


@dataclass
class _Working:
    """Methods that have not failed so far, and why others have."""

    methods: list[Method]
    failures: dict[str, str]

    def drop(self, method: Method, error: Exception) -> None:
        """Go on without a method; without the one that all are compared with there is no going on."""
        if method is self.methods[0]:
            raise error
        self.failures[method.name] = f"{type(error).__name__}: {error}"
        self.methods.remove(method)
        logger.warning(f"{method.name} cannot run on this target and is left out: {self.failures[method.name]}")


def _warm_up(
    target: Any, encoder: PromptEncoder, working: _Working, batches: Sequence[Batch], settings: Settings
) -> None:
    """Run the methods on the first batches without looking at the clock."""
    rounds = [(t, batch) for batch in batches[: settings.num_warmup] for t in settings.temperatures]
    for temperature, batch in tqdm(rounds, desc="warm-up", unit="batch"):
        _run_all(target, encoder, working, batch, temperature, settings)


def _run_all(
    target: Any,
    encoder: PromptEncoder,
    working: _Working,
    batch: Batch,
    temperature: float,
    settings: Settings,
    turn: int = 0,
    repeats: int = 1,
) -> dict[str, list[Measurement]]:
    """One batch through all methods, again and again, in an order that changes each time."""
    inputs = encoder.encode([(prompt.messages, prompt.images) for prompt in batch])
    runs: dict[str, list[Measurement]] = {}
    for repeat in range(repeats):
        gc.collect()  # rather here than in the middle of a measurement
        for method in _ordered(working.methods, turn * repeats + repeat):
            torch.manual_seed(settings.seed + batch[0].index)
            try:
                arguments = method.ready(temperature, settings.max_new_tokens)
                runs.setdefault(method.name, []).append(measure(target, inputs, arguments))
            except Exception as error:  # whatever a target's own code raises for a method it was not made for
                working.drop(method, error)
    return runs


def _ordered(methods: Sequence[Method], turn: int) -> list[Method]:
    """The methods in an order that changes from turn to turn: each comes first, last, and after each of its neighbours."""
    rounds, start = divmod(turn, len(methods))
    order = [*methods[start:], *methods[:start]]
    return order[::-1] if rounds % 2 else order


def _read(file: Path) -> dict[Key, dict[str, list[Measurement]]]:
    cut_unfinished_line(file)
    found = {}
    for _, entry in entries(file):
        runs = {name: [Measurement.from_dict(values) for values in repeats] for name, repeats in entry["runs"].items()}
        found[(entry["temperature"], entry["task"], entry["index"])] = runs
    return found


def _append(file: Path, key: Key, runs: Mapping[str, Sequence[Measurement]]) -> None:
    temperature, task, index = key
    entry = {"temperature": temperature, "task": task, "index": index}
    append(file, {**entry, "runs": {name: [run.to_dict() for run in repeats] for name, repeats in runs.items()}})
