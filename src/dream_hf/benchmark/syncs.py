"""Host-device syncs of a decoding step: how often the host waits until the device has caught up with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..decoding import loop as generation

MESSAGE = "synchronizing CUDA operation"  # in PyTorch's warning of each


def count_syncs(run: Callable[[], Any]) -> dict[str, float] | None:
    """Count the syncs of every decoding step while `run` decodes with a drafter on a CUDA device.

    PyTorch's sync debug mode tells of reads of device values, copies to the host and the like; explicit waits, for whole
    streams or events, it leaves out (https://docs.pytorch.org/docs/stable/generated/torch.cuda.set_sync_debug_mode.html).

    Returns:
        `dict`: `mean` and `most` over the steps; None where there was no step.
    """
    counts: list[int] = []
    step: Any = generation._Decoding.step
    with _sync_warnings() as caught:

        def counted(*args: Any) -> None:
            before = _number_of(caught)
            step(*args)
            counts.append(_number_of(caught) - before)

        generation._Decoding.step = counted  # type: ignore[method-assign, assignment]
        try:
            run()
        finally:
            generation._Decoding.step = step  # type: ignore[method-assign]
    return {"mean": sum(counts) / len(counts), "most": max(counts)} if counts else None


@contextmanager
def _sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of the block, one for every sync among them."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode(before)


def _number_of(caught: list[warnings.WarningMessage]) -> int:
    return sum(MESSAGE in str(warning.message) for warning in caught)
