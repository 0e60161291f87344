"""What tuning has measured so far, so that it goes on where it was when it is started again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...regeneration.journal import SETTINGS, append, begin_folder, cut_unfinished_line, entries, write_whole
from .choice import Trace

FOLDER, ROUNDS = "tuning", "rounds.jsonl"
Traces = dict[int, Trace] | None  # by top-k


class Journal:
    """Measurements by name, each made once. A kill loses what was being made.

    Args:
        output (`Path`, *optional*): Where to keep them, in a folder `tuning`; by default they are not kept.
        settings (`Mapping`): What the measurements depend on.

    Raises:
        ValueError: `output` was begun with other settings.
    """

    def __init__(self, output: Path | None = None, settings: Mapping[str, Any] | None = None):
        self.folder = None if output is None else output / FOLDER
        self.found: dict[str, Any] = {}
        if self.folder is not None:
            begin_folder(self.folder, settings or {})
            cut_unfinished_line(self.folder / ROUNDS)
            self.found = {entry["name"]: entry["value"] for _, entry in entries(self.folder / ROUNDS)}
        self.is_resumed = bool(self.found)

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The value that `make` makes or once made, as JSON has it."""
        if name not in self.found:
            value = json.loads(json.dumps(make()))
            if self.folder is not None:
                append(self.folder / ROUNDS, {"name": name, "value": value})
            self.found[name] = value
        return self.found[name]

    def traces_once(self, name: str, make: Callable[[], Traces]) -> Traces:
        """The same for the traces of an answer, which are too large for JSON."""
        file = None if self.folder is None else self.folder / f"{name}.npz"
        if file is not None and file.is_file():
            return _unpacked(file)
        traces = make()
        if file is not None:
            write_whole(file, _packed(traces))
        return traces


def discard(output: Path) -> None:
    """Remove what a finished tuning has kept in a folder, so that the next one measures anew."""
    folder = output / FOLDER
    for file in (folder / SETTINGS, folder / ROUNDS, *folder.glob("trace *.npz")):
        file.unlink(missing_ok=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _packed(traces: Traces) -> bytes:
    arrays = {
        f"{top_k} {field}": values
        for top_k, trace in (traces or {}).items()
        for field, values in asdict(trace).items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _unpacked(file: Path) -> Traces:
    by_top_k: dict[int, dict[str, np.ndarray]] = {}
    with np.load(file) as arrays:
        for name, values in arrays.items():
            top_k, field = name.split(" ")
            by_top_k.setdefault(int(top_k), {})[field] = values
    return {top_k: Trace(**fields) for top_k, fields in by_top_k.items()} or None
