"""Clocks for the phases of decoding, which `runtime.phases` names: time by phase, and host-device syncs by step."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.profiler import record_function

from ..decoding.drafter import Drafter
from ..runtime.phases import DRAFTER, STEP, TARGET, clocked_by
from .measure import synchronize

HOOKED_LEVELS = 3  # how deep below the target modules are watched that `generate()` may call by themselves
SYNC_MESSAGE = "synchronizing CUDA operation"  # in PyTorch's warning of each


class PhaseClock:
    """Time spent in phases, each without those that ran inside it.

    `seconds` is by the phases that were running, the outermost first: `("step", "tree growth")` for instance.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[tuple[str, ...], float] = defaultdict(float)
        self.running: tuple[str, ...] = ()
        self.since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the block for the phase `name`."""
        self.enter(name)
        with record_function(f"dream_hf: {name}"):
            try:
                yield
            finally:
                self.leave()

    def enter(self, name: str) -> None:
        """A phase begins."""
        self._switch((*self.running, name))

    def leave(self) -> None:
        """The phase that began last ends."""
        self._switch(self.running[:-1])

    def by_innermost(self, outermost: str) -> dict[str, float]:
        """Seconds by phase, whatever it ran inside, in calls of the phase `outermost`; 0 for what never ran."""
        found: dict[str, float] = defaultdict(float)
        for path, seconds in self.seconds.items():
            if path[0] == outermost:
                found[path[-1]] += seconds
        return found

    def by_owner(self) -> dict[str, float]:
        """Seconds of the forwards of "target" and "drafter", with all that ran inside them."""
        found = {TARGET: 0.0, DRAFTER: 0.0}
        for path, seconds in self.seconds.items():
            owner = next((name for name in path if name in found), None)
            if owner is not None:
                found[owner] += seconds
        return {"target": found[TARGET], "drafter": found[DRAFTER]}

    def _switch(self, running: tuple[str, ...]) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running] += now - self.since
        self.running, self.since = running, now


@contextmanager
def clocked(target: Any, assistant: Any = None) -> Iterator[PhaseClock]:
    """Clock decoding while in the block; `assistant` is what drafts, if anything does.

    With a [`Drafter`] nothing is hooked to modules: it would decode more slowly, and compiled forwards take no hooks. The
    other ways of decoding have no phases but the calls of the models.
    """
    clock = PhaseClock(target.device)
    with ExitStack() as stack:
        if isinstance(assistant, Drafter):
            stack.enter_context(clocked_by(clock))
        else:
            for module in _upper_modules(target, HOOKED_LEVELS):
                _watch(stack, clock, module, TARGET)
            if isinstance(assistant, nn.Module):
                _watch(stack, clock, assistant, DRAFTER)
        yield clock


def count_syncs(run: Callable[[], Any]) -> dict[str, float] | None:
    """Count the syncs of every decoding step while `run` decodes with a drafter on a CUDA device.

    PyTorch's sync debug mode tells of reads of device values, copies to the host and the like; explicit waits, for whole
    streams or events, it leaves out (https://docs.pytorch.org/docs/stable/generated/torch.cuda.set_sync_debug_mode.html).

    Returns:
        `dict`: `mean` and `most` over the steps; None where there was no step.
    """
    counts: list[int] = []
    with _sync_warnings() as caught:

        @contextmanager
        def counting(name: str) -> Iterator[None]:
            before = _number_of(caught) if name == STEP else 0
            yield
            if name == STEP:
                counts.append(_number_of(caught) - before)

        with clocked_by(counting):
            run()
    return {"mean": sum(counts) / len(counts), "most": max(counts)} if counts else None


def _watch(stack: ExitStack, clock: PhaseClock, module: nn.Module, name: str) -> None:
    """Count a module's calls for the phase `name` until the stack is closed."""
    for handle in (
        module.register_forward_pre_hook(lambda *_: clock.enter(name)),
        module.register_forward_hook(lambda *_: clock.leave(), always_call=True),
    ):
        stack.callback(handle.remove)


def _upper_modules(module: nn.Module, levels: int) -> Iterator[nn.Module]:
    yield module
    if levels and not isinstance(module, nn.ModuleList):
        for child in module.children():
            yield from _upper_modules(child, levels - 1)


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
    return sum(SYNC_MESSAGE in str(each.message) for each in caught)
