"""Measurements -> rows of results, and the files that hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..regeneration.journal import write_whole
from .runner import Key, Samples
from .statistics import median_of, summarize
from .tables import render

ALL_TASKS = "all"


def make_rows(samples: Samples, baseline: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows by method, temperature and task, and the same over all tasks together; `baseline` is what is compared with."""
    rows, overall = [], []
    for temperature in _unique(key[0] for key in samples.runs):
        keys = [key for key in samples.runs if key[0] == temperature]
        tasks = _unique(key[1] for key in keys)
        for task in tasks:
            rows += _rows_of(samples, [key for key in keys if key[1] == task], task, baseline)
        if len(tasks) > 1:
            overall += _rows_of(samples, keys, ALL_TASKS, baseline)
    return rows, overall


def _rows_of(samples: Samples, keys: Sequence[Key], task: str, baseline: str) -> list[dict[str, Any]]:
    """A row for each method over some prompts of one temperature."""
    temperature = keys[0][0]
    rows = []
    for method in _unique([baseline, *(name for key in keys for name in samples.runs[key])]):
        shared = [key for key in keys if method in samples.runs[key]]
        runs, plain = ([median_of(samples.runs[key][name]) for key in shared] for name in (method, baseline))
        figures = summarize(runs, plain, temperature == 0)
        _, worst_task, worst_index = shared[figures.pop("worst_place")]
        figures["worst_prompt"] = {"task": worst_task, "index": worst_index}
        rows.append({"method": method, "temperature": temperature, "task": task, **figures})
    return rows


def write_results(results: Mapping[str, Any], output: Path) -> None:
    """Write `results.json` and `results.md` into a folder."""
    for name, text in (("results.json", json.dumps(results, indent=2) + "\n"), ("results.md", render(results))):
        write_whole(output / name, text.encode())


def _unique(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))
