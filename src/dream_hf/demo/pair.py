"""The bundled pair: a small target trained from scratch for the demo world, and its drafter."""

from __future__ import annotations

from typing import Any

import torch

from ..load_models import DEMO, load_models


def load_pair(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> tuple[Any, Any, Any]:
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
    models = load_models(DEMO, DEMO, dtype=dtype, device=str(device))
    return models.target, models.drafter, models.processor
