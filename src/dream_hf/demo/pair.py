"""The bundled pair: a small target trained from scratch for the demo world, and its drafter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..drafters.dream.drafter import DreamDrafter

TARGET = Path(__file__).with_name("target")
DRAFTER = Path(__file__).with_name("drafter")


def load_pair(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> tuple[Any, DreamDrafter, Any]:
    """Load the bundled target, drafter and processor; no network is needed.

    Args:
        dtype (`torch.dtype`): The weights are stored in 16 bit. float32 is the faster one for models of this size on
            most CPUs, and makes greedy decoding with and without the drafter token-identical.
        device (`str` or `torch.device`): Where to put both.

    Returns:
        `tuple`: The target and the drafter, in evaluation mode, and the processor.

    Raises:
        OSError: This copy of the package has no weights.
    """
    check_weights()
    target: Any = AutoModelForImageTextToText.from_pretrained(TARGET, dtype=dtype)
    drafter: Any = DreamDrafter.from_pretrained(DRAFTER, dtype=dtype)
    return target.to(device).eval(), drafter.to(device).eval(), AutoProcessor.from_pretrained(TARGET)


def check_weights(*names: str) -> None:
    """Raise an `OSError` that says what to do where bundled files are missing.

    Args:
        names (`str`): What is needed: "target", "drafter"; both by default.
    """
    folders = {"target": TARGET, "drafter": DRAFTER}
    for name in names or tuple(folders):
        for file in ("config.json", "model.safetensors"):
            if not (folders[name] / file).is_file():
                raise FileNotFoundError(
                    f"The bundled demo {name} is incomplete: this copy of the package came without demo/{name}/{file}. "
                    f"Install a released package, train the pair with examples/demo_pair, or name your own with --{name}."
                )
