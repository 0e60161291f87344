"""What it means to read numbers of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def reads_wait(device: torch.device) -> bool:
    """Whether reading a number from a device means waiting for all that it has been asked to do."""
    return device.type != "cpu"


def fetch(numbers: torch.Tensor) -> Callable[[], list[Any]]:
    """Send numbers on their way to the host; what is returned waits for them, and for nothing that is asked for later."""
    if numbers.device.type != "cuda":
        return numbers.tolist
    sent = numbers.to("cpu", non_blocking=True)
    arrival = torch.cuda.current_stream(numbers.device).record_event()

    def arrived() -> list[Any]:
        arrival.synchronize()
        return sent.tolist()

    return arrived
