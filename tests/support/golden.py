"""Checkpoints in published layouts with what the peers' own programs make of them, where this machine has them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(os.environ.get("DREAM_HF_GOLDEN") or Path(__file__).parents[2] / ".." / "shared" / "golden")
TOLERANCE: dict[str, float] = {"rtol": 0.0, "atol": 2e-4}  # of the peers' float32
MISSING = f"there are no golden cases in {ROOT}; name their folder in DREAM_HF_GOLDEN"


@dataclass(frozen=True)
class Case:
    """One checkpoint, inputs and the outputs of the program that its layout belongs to."""

    folder: Path

    @cached_property
    def io(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "io.safetensors")

    @cached_property
    def expected(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text())

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def target_name(self) -> str:
        return Path(self.expected["target"]).name

    def __repr__(self) -> str:
        return self.folder.name


def cases(prefix: str) -> list[Case]:
    """All cases whose name begins so; none where this machine has none."""
    return [Case(path) for path in sorted(ROOT.glob(f"{prefix}*")) if (path / "expected.json").is_file()]
