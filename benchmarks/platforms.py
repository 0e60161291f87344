"""What a benchmark ran on."""

from __future__ import annotations

import platform
from typing import Any

import torch
import transformers


def describe_platform(device: str) -> dict[str, Any]:
    """The device, and versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
