"""What it means to read numbers of a tensor."""

from __future__ import annotations

import torch


def reads_wait(device: torch.device) -> bool:
    """Whether reading a number from a device means waiting for all that it has been asked to do."""
    return device.type != "cpu"
