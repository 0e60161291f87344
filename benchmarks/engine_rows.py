"""One row: a target, a prompt length and a batch size, measured in all ways."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from engine_floor import Bytes, cache_bytes, count_bytes
from engine_planting import make_plan
from engine_shapes import make_prompt
from engine_ways import NUM_SKIPPED, Run, run_dream, run_plain, split_step, why_not_compiled
from torch import Tensor
from transformers.utils import logging

from dream_hf import DreamDrafter
from dream_hf.decoding.drafter import Drafter

logger = logging.get_logger(__name__)

OUT_OF_MEMORY = "out of memory"
WAYS = ("plain", "plain_compiled", "dream", "dream_compiled")
Figures = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """
    How every row is measured.

    Args:
        tree (`tuple`): Depth, top-k and size.
        taus (`Sequence[float]`): Tokens gained per step, bonus included, in ascending order.
        num_steps (`int`): Steps at the largest of them. All ways generate the same number of tokens.
        repeats (`int`): Timed runs of each kind, of which the median counts; one more warms up.
        with_compiled (`bool`): Also measure the compiled ways.
        is_suggested (`bool`): Drafters and depths are those suggested for each target.
    """

    tree: tuple[int, int, int] = (6, 4, 32)
    taus: Sequence[float] = (3.0, 4.0, 5.0)
    num_steps: int = 32
    repeats: int = 1
    with_compiled: bool = True
    is_suggested: bool = False

    def __post_init__(self) -> None:
        if self.num_steps <= NUM_SKIPPED:
            raise ValueError(
                f"`num_steps` ({self.num_steps}) must exceed {NUM_SKIPPED}, the steps before the clock starts."
            )

    @property
    def num_tokens(self) -> int:
        """New tokens after the first one."""
        return round(self.num_steps * max(self.taus))


def parse_tree(text: str) -> tuple[int, int, int]:
    """Depth, top-k and size out of "6/4/32"."""
    try:
        depth, top_k, size = (int(part) for part in text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"`{text}` must be depth/top_k/size, such as 6/4/32") from error
    return depth, top_k, size


def measure_row(
    target: Any, drafter: DreamDrafter, prompt_length: int, batch: int, settings: Settings, bandwidth: float
) -> Figures:
    """All figures of a row; a way that fails has an `error` instead."""
    prompt = make_prompt(target, prompt_length, batch)
    plain = attempt(lambda: _plain(target, prompt, settings))
    texts = plain.pop("sequences", None)
    row: Figures = {"plain": plain}
    if texts is None:
        row.update({way: {"error": f"plain decoding: {plain['error']}"} for way in WAYS[1:]})
        return row
    dream = _Dream(target, drafter, texts, prompt_length, settings)
    row["dream"] = attempt(dream.figures)
    for way in ("plain_compiled", "dream_compiled"):
        row[way] = {"error": "not measured"}
    if settings.with_compiled:
        row["plain_compiled"] = attempt(lambda: _plain(target, prompt, settings, is_compiled=True))
        row["plain_compiled"].pop("sequences", None)
        release_memory()
        row["dream_compiled"] = attempt(dream.compiled_figures)
    release_memory()
    weights = count_bytes(target, drafter)
    slots = cache_bytes(target, prompt_length + settings.num_tokens // 2, batch)
    row["floor"] = _floor(weights, slots, settings.tree[0], bandwidth)
    compare(row, weights)
    return {way: row[way] for way in (*WAYS, "floor")}


def attempt(measure: Callable[[], Figures]) -> Figures:
    """What `measure` returns, or the error that stopped it."""
    try:
        return measure()
    except Exception as error:
        if not is_out_of_memory(error):
            logger.warning(f"Not measured: {type(error).__name__}: {error}")
        message = OUT_OF_MEMORY if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
    release_memory()
    return {"error": message}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Give back what nobody holds any more, compiled graphs and their pools included."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(row: Figures, weights: Bytes) -> None:
    """Add to the figures of trees what plain decoding makes of them: ratios, speedups, memory."""
    references = {"plain": "speedup_over_plain", "plain_compiled": "speedup_over_compiled"}
    for way, own in (("dream", "plain"), ("dream_compiled", "plain_compiled")):
        figures = row[way]
        if "error" in figures:
            continue
        if "error" not in row[own]:
            figures["step_ratio"] = figures["step_ms"] / row[own]["step_ms"]
        for reference, name in references.items():
            for entry in figures["at_tau"].values():
                is_known = "error" not in row[reference]
                entry[name] = entry["tau"] * row[reference]["step_ms"] / entry["step_ms"] if is_known else None
        peaks = figures["peak_bytes"], row["plain"]["peak_bytes"]
        above = None if None in peaks else peaks[0] - peaks[1] + weights.drafter
        figures["bytes_above_plain"] = above


def _plain(target: Any, prompt: Tensor, settings: Settings, is_compiled: bool = False) -> Figures:
    run_plain(target, prompt, settings.num_tokens, is_compiled)
    runs = [run_plain(target, prompt, settings.num_tokens, is_compiled) for _ in range(settings.repeats)]
    return {**_timed(runs), "sequences": runs[0].sequences}


@dataclass(frozen=True)
class _Dream:
    """Decoding `texts` (B, length) with trees."""

    target: Any
    drafter: Drafter
    texts: Tensor
    prompt_length: int
    settings: Settings

    def compiled_figures(self) -> Figures:
        figures = replace(self, drafter=self.drafter.with_settings(compile=True)).figures()
        reason = why_not_compiled(self.target)
        return figures if reason is None else {"error": f"not compiled: {reason}"}

    def figures(self) -> Figures:
        """Times at each tau, and in all; where a step's time goes; what was not as planned."""
        for tau in self.settings.taus:  # shapes and kernels that are new cost a lot the first time
            run_dream(*self._arguments(self._plan(tau)))
        by_tau = {tau: self._runs(self._plan(tau)) for tau in self.settings.taus}
        every_run = [run for runs in by_tau.values() for run in runs]
        return {
            **_timed(every_run),
            "at_tau": {f"{tau:g}": self._at_tau(runs, self._plan(tau)) for tau, runs in by_tau.items()},
            "split": split_step(*self._arguments(self._plan(self.settings.taus[0]))),
        }

    def _runs(self, plan: Tensor) -> list[Run]:
        return [run_dream(*self._arguments(plan)) for _ in range(self.settings.repeats)]

    def _at_tau(self, runs: list[Run], plan: Tensor) -> Figures:
        gains = [run.gains for run in runs if run.gains is not None]
        return {
            "tau": statistics.mean(float(gain[gain >= 0].float().mean()) for gain in gains),
            "step_ms": 1e3 * statistics.median(run.forward_seconds for run in runs),
            "num_steps": plan.shape[1],
            "is_as_planned": all(torch.equal(gain.cpu(), plan + 1) for gain in gains),
            "is_plain_text": all(torch.equal(run.sequences, self.texts) for run in runs),
        }

    def _plan(self, tau: float) -> Tensor:
        return make_plan(tau, self.settings.tree[0], self.settings.num_tokens, len(self.texts))

    def _arguments(self, plan: Tensor) -> tuple[Any, ...]:
        return self.target, self.drafter, self.texts, self.prompt_length, plan


def _timed(runs: list[Run]) -> Figures:
    peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
    return {
        "step_ms": 1e3 * statistics.median(run.forward_seconds for run in runs),
        "start_ms": 1e3 * statistics.median(run.start_seconds for run in runs),
        "peak_bytes": max(peaks, default=None),
    }


def _floor(weights: Bytes, cache: int, depth: int, bandwidth: float) -> Mapping[str, Any]:
    """Milliseconds per step: weights alone, and with the keys and values that the target reads."""
    plain, tree = weights.plain_step(), weights.tree_step(depth)
    return {
        "decoder_bytes": weights.decoder,
        "head_bytes": weights.head,
        "drafter_bytes": weights.drafter,
        "cache_bytes": cache,
        "plain_ms": 1e3 * plain / bandwidth,
        "tree_ms": 1e3 * tree / bandwidth,
        "plain_with_cache_ms": 1e3 * (plain + cache) / bandwidth,
        "tree_with_cache_ms": 1e3 * (tree + cache) / bandwidth,
    }
