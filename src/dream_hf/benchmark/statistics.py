"""Paired measurements -> the figures of a results row. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .measure import Measurement

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
HISTOGRAM_BINS = 10
SLOW = 0.95  # of plain decoding's speed; below it a prompt counts as slowed down

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]  # plain and method (resamples, n) -> (resamples,)


def ratio_of_totals(plain: np.ndarray, method: np.ndarray) -> np.ndarray:
    """Total plain time over total time, prompts in the last axis: the paper's speedup."""
    return plain.sum(-1) / method.sum(-1)


def median_ratio(plain: np.ndarray, method: np.ndarray) -> np.ndarray:
    """Median over the prompts of each prompt's own ratio."""
    return np.median(plain / method, axis=-1)


def bootstrap_interval(
    statistic: Statistic, plain: Sequence[float], method: Sequence[float], seed: int = 0
) -> list[float] | None:
    """Percentile interval of a statistic of pairs, resampling prompts; None for fewer than two prompts."""
    if len(plain) < 2:
        return None
    draws = np.random.default_rng(seed).integers(len(plain), size=(NUM_RESAMPLES, len(plain)))
    values = statistic(np.asarray(plain)[draws], np.asarray(method)[draws])
    tail = (1 - CONFIDENCE) / 2
    return [float(value) for value in np.quantile(values, [tail, 1 - tail])]


def median_of(repeats: Sequence[Measurement]) -> Measurement:
    """
    Several runs of one method on one prompt as a single one: median times, the highest peak of memory.

    The tokens are those of the first run, or of a run that wrote something else if there is one: only where all agree can they
    match another method's.
    """
    first = repeats[0]
    run = next((other for other in repeats if other.rows != first.rows), first)
    peaks = [other.peak_bytes for other in repeats if other.peak_bytes is not None]
    return replace(
        run,
        seconds=float(np.median([other.seconds for other in repeats])),
        first_token_seconds=float(np.median([other.first_token_seconds for other in repeats])),
        peak_bytes=max(peaks, default=None),
    )


def summarize(runs: Sequence[Measurement], plain: Sequence[Measurement], is_greedy: bool) -> dict[str, Any]:
    """Figures of one method on the same prompts as `plain`; what each means is in docs/benchmarking.md."""
    return {
        "num_prompts": sum(len(run.rows) for run in runs),
        **_speedups(runs, plain),
        **_worst(runs, plain),
        "match_rate": _match_rate(runs, plain) if is_greedy else None,
        **_gains(runs),
        "tokens_per_second": sum(run.num_tokens for run in runs) / sum(run.seconds for run in runs),
        "seconds_median": float(np.median([run.seconds for run in runs])),
        "first_token_seconds_median": float(np.median([run.first_token_seconds for run in runs])),
        "peak_bytes": max((run.peak_bytes for run in runs if run.peak_bytes is not None), default=None),
        "output_length": _lengths(runs),
    }


def _speedups(runs: Sequence[Measurement], plain: Sequence[Measurement]) -> dict[str, Any]:
    totals = [other.seconds for other in plain], [run.seconds for run in runs]
    per_token = [_per_token(other) for other in plain], [_per_token(run) for run in runs]
    decode = [
        (_decode_per_token(other), _decode_per_token(run))
        for run, other in zip(runs, plain, strict=True)
        if _decode_per_token(other) is not None and _decode_per_token(run) is not None
    ]
    figures: dict[str, Any] = {}
    for name, statistic, (before, after) in (
        ("speedup", ratio_of_totals, totals),
        ("speedup_median", median_ratio, per_token),
        ("speedup_decode", median_ratio, tuple(zip(*decode, strict=True)) if decode else ((), ())),
    ):
        has_any = len(before) > 0
        figures[name] = float(statistic(np.asarray(before), np.asarray(after))) if has_any else None
        figures[f"{name}_interval"] = bootstrap_interval(statistic, before, after) if has_any else None
    return figures


def _worst(runs: Sequence[Measurement], plain: Sequence[Measurement]) -> dict[str, Any]:
    """The smallest of the prompts' own ratios, which prompt that was, and how many were slowed down."""
    ratios = np.array([_per_token(other) / _per_token(run) for run, other in zip(runs, plain, strict=True)])
    return {
        "worst_speedup": float(ratios.min()),
        "worst_place": int(ratios.argmin()),
        "slow_share": float((ratios < SLOW).mean()),
    }


def _per_token(run: Measurement) -> float:
    return run.seconds / run.num_tokens


def _decode_per_token(run: Measurement) -> float | None:
    """Seconds per token after the first ones had come; None where nothing followed."""
    num_later = run.num_tokens - run.num_first_tokens
    return (run.seconds - run.first_token_seconds) / num_later if num_later > 0 else None


def _gains(runs: Sequence[Measurement]) -> dict[str, Any]:
    gains = np.array([gain for run in runs for gain in run.gains])
    if not len(gains):
        return {"tau": None, "tau_without_bonus": None, "acceptance_by_depth": [], "num_steps": 0}
    return {
        "tau": float(gains.mean()),
        "tau_without_bonus": float(gains.mean() - 1),
        "acceptance_by_depth": [float((gains > depth).mean()) for depth in range(1, int(gains.max()))],
        "num_steps": len(gains),
    }


def _lengths(runs: Sequence[Measurement]) -> dict[str, Any]:
    lengths = [len(row) for run in runs for row in run.rows]
    counts, edges = np.histogram(lengths, bins=HISTOGRAM_BINS)
    return {
        "mean": float(np.mean(lengths)),
        "median": float(np.median(lengths)),
        "histogram": {"edges": [float(edge) for edge in edges], "counts": [int(count) for count in counts]},
    }


def _match_rate(runs: Sequence[Measurement], plain: Sequence[Measurement]) -> float:
    pairs = [pair for run, other in zip(runs, plain, strict=True) for pair in zip(run.rows, other.rows, strict=True)]
    return float(np.mean([row == same for row, same in pairs]))
