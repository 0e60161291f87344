"""Rows -> a JSON file that is whole after every row, and a table."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from engine_rows import WAYS, Settings

from dream_hf.benchmark.provenance import describe_machine
from dream_hf.regeneration.journal import difference, write_whole
from dream_hf.version import __version__

NOTE = (
    "Simulated acceptance: random weights cannot be predicted, so the true continuation is planted in the drafted trees with "
    "the probabilities that give each tau (bonus included). Drafter and target do all of their work. Prompts are random text "
    "tokens; no picture is encoded."
)
SPLIT = ("target", "drafter", "rest", "planting")
NAMES = {
    "plain": "plain",
    "plain_compiled": "plain, compiled",
    "dream": "dream tree",
    "dream_compiled": "dream tree, compiled",
}


def describe(device: torch.device, dtype: torch.dtype, settings: Settings, bandwidth: float) -> dict[str, Any]:
    """Machine, versions and settings."""
    return {
        **describe_source(device),
        "copy_bytes_per_second": bandwidth,
        "settings": {
            "dtype": str(dtype).removeprefix("torch."),
            "tree": "/".join(map(str, settings.tree)),
            "taus": list(settings.taus),
            "new_tokens": 1 + settings.num_tokens,
            "repeats": settings.repeats,
            "with_compiled": settings.with_compiled,
            "is_suggested": settings.is_suggested,
        },
    }


def describe_source(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    return {
        "machine": describe_machine(device),
        "revision": _revision(),
        "versions": {
            "dream_hf": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")},
        },
    }


@dataclass
class Results:
    """Rows so far; `file` holds them all at any time."""

    provenance: dict[str, Any]
    file: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.file is None or not self.file.is_file():
            return
        begun = json.loads(self.file.read_text(encoding="utf-8"))
        names = ("machine", "versions", "settings")
        changed = difference(
            *({name: each[name] for name in names} for each in (begun["provenance"], self.provenance))
        )
        if changed is not None:
            raise ValueError(
                f"`output` ({self.file.name!r}) was begun with {changed}. Name another file, or remove this one."
            )
        self.provenance, self.rows = begun["provenance"], begun["rows"]

    def has(self, shape: str, prompt_length: int, batch: int) -> bool:
        """Whether a row is there already."""
        return any((row["shape"], row["prompt"], row["batch"]) == (shape, prompt_length, batch) for row in self.rows)

    def add(self, shape: str, prompt_length: int, batch: int, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a row and write the file anew."""
        row = {"shape": shape, "prompt": prompt_length, "batch": batch, **figures}
        self.rows.append(row)
        if self.file is not None:
            content = {"note": NOTE, "provenance": self.provenance, "rows": self.rows}
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, (json.dumps(content, indent=2) + "\n").encode())
        return row


def table(rows: Sequence[Mapping[str, Any]], taus: Sequence[float]) -> str:
    """One line for each row and way. Speedups stand over plain / over compiled plain decoding."""
    head = ["shape", "prompt", "batch", "way", "ms/step", "x plain step", "x floor", "target/drafter/rest/planting"]
    head += [*(f"tau {tau:g}" for tau in taus), "MB above plain"]
    lines = [
        [*map(str, (row["shape"], row["prompt"], row["batch"])), *_cells(row, way, taus)]
        for row in rows
        for way in WAYS
    ]
    return "\n".join(("simulated acceptance; speedups over plain / over compiled plain", "", *aligned([head, *lines])))


def _cells(row: Mapping[str, Any], way: str, taus: Sequence[float]) -> list[str]:
    """Columns from the way's name on."""
    figures, is_tree = row[way], way.startswith("dream")
    if "error" in figures:
        return [NAMES[way], figures["error"].splitlines()[0][:60]] + [""] * (4 + len(taus))
    floor = row["floor"]["tree_ms" if is_tree else "plain_ms"]
    cells = [NAMES[way], f"{figures['step_ms']:.2f}", "", f"{figures['step_ms'] / floor:.2f}", ""]
    if not is_tree:
        return cells + [""] * (1 + len(taus))
    cells[2] = _number(figures.get("step_ratio"))
    cells[4] = "/".join(f"{100 * figures['split'][part]:.0f}" for part in SPLIT) + " %"
    for tau in taus:
        entry = figures["at_tau"].get(f"{tau:g}")
        if entry is None:  # more than trees of this depth can gain
            cells.append("-")
            continue
        flag = "" if entry["is_as_planned"] else f" (got tau {entry['tau']:.2f})"
        cells.append(f"{_number(entry['speedup_over_plain'])} / {_number(entry['speedup_over_compiled'])}{flag}")
    above = figures["bytes_above_plain"]
    return [*cells, "-" if above is None else f"{above / 1e6:.0f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def aligned(lines: list[list[str]]) -> list[str]:
    """A Markdown table of cells, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]


def _revision() -> str | None:
    """The commit of the source this script belongs to, "-dirty" behind it where files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
