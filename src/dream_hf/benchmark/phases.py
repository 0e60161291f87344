"""One decoding step taken apart: target, drafter, tree growth, acceptance, caches, masks and the rest."""

from __future__ import annotations

import functools
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from ..data.prompts import PromptEncoder
from ..decoding import loop as generation
from .measure import measure, synchronize
from .methods import Method
from .shares import clocked_head, function_to_clock
from .syncs import count_syncs
from .tasks import Prompt

logger = logging.get_logger(__name__)

PREFILL, REST = "prefill", "rest"
PHASES = ("target forward", "drafter forward", "tree growth", "acceptance", "cache work", "mask building", REST)
# Functions of this package by phase. Time in a function that is called inside another one counts for the inner one.
FUNCTIONS = {
    "generation:_Decoding.prefill": PREFILL,
    "verifying:Forwards.__call__": "target forward",
    "verifying:CompiledForwards.__call__": "target forward",
    "generation:grow_tree": "tree growth",
    "choosing:Chooser.verify": "acceptance",
    "caches:SlotLayer.update": "cache work",
    "caches:SlotLayer.keep": "cache work",
    "caches:Slots.commit": "cache work",
    "drafter_state:DrafterState._forward": "drafter forward",
    "drafter_state:CompiledDrafterState._compiled_level": "drafter forward",
    "modeling_dream:attention_bias": "mask building",
}
MASK_NAMES = ("sdpa", "eager", "flex_attention")


class PhaseClock:
    """Exclusive time per phase: a phase stops while another one runs inside it, except inside the prefill."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.running: list[str] = []
        self.since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block for `name`."""
        if PREFILL in self.running:
            yield
            return
        self._switch()
        self.running.append(name)
        with record_function(f"dream_hf: {name}"):
            try:
                yield
            finally:
                self._switch()
                self.running.pop()

    def _switch(self) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        if self.running:
            self.seconds[self.running[-1]] += now - self.since
        self.since = now

    def timed(self, function: Callable, name: str) -> Callable:
        """`function`, counted for `name`."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return call


@contextmanager
def clocked(device: torch.device) -> Iterator[PhaseClock]:
    """Clock the phases of decoding while in the block. Nothing is hooked to modules: see [`watching`]."""
    clock = PhaseClock(device)
    masks: Any = AttentionMaskInterface._global_mapping  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for address, name in FUNCTIONS.items():
            owner, attribute = find_function(address)
            _replace(stack, owner, attribute, clock.timed(function_to_clock(owner, attribute), name))
        for name in MASK_NAMES:
            if name in masks:
                stack.callback(masks.__setitem__, name, masks[name])
                masks[name] = clock.timed(masks[name], "mask building")
        _replace(
            stack, generation, "TargetHead", clocked_head(lambda function: clock.timed(function, "drafter forward"))
        )
        yield clock


def profile_steps(
    target: Any,
    encoder: PromptEncoder,
    method: Method,
    prompt: Prompt,
    max_new_tokens: int,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Split a method's decoding step, and write a `torch.profiler` trace that names the phases.

    Args:
        target (`PreTrainedModel`): The target.
        encoder (`PromptEncoder`): Writes its prompts.
        method (`Method`): A DREAM method.
        prompt (`Prompt`): What to decode, greedily.
        max_new_tokens (`int`): How far.
        trace (`Path`, *optional*): File for the trace, in Chrome's format.

    Returns:
        `dict`: `milliseconds_per_step` and `share_of_step` by phase, `num_steps`, `prefill_milliseconds`, and
        `host_device_syncs`, `mean` and `most` of a step, which is None where host and device are one.
    """
    inputs = encoder.encode([(prompt.messages, prompt.images)])
    with method.ready(target, inputs, 0.0, max_new_tokens) as arguments:
        measure(target, inputs, arguments)
        with clocked(target.device) as clock:
            run = measure(target, inputs, arguments)
        syncs = count_syncs(lambda: measure(target, inputs, arguments)) if target.device.type == "cuda" else None
        if trace is not None:
            _write_trace(target, inputs, arguments, trace)
    num_steps = max(len(run.gains), 1)
    prefill = clock.seconds.pop(PREFILL, 0.0)
    decoding = max(run.seconds - run.first_token_seconds, 1e-9)
    clock.seconds[REST] = max(decoding - sum(clock.seconds.values()), 0.0)
    total = sum(clock.seconds.values())
    return {
        "num_steps": len(run.gains),
        "prefill_milliseconds": 1e3 * prefill,
        "milliseconds_per_step": {name: 1e3 * clock.seconds[name] / num_steps for name in PHASES},
        "share_of_step": {name: clock.seconds[name] / total for name in PHASES},
        "host_device_syncs": syncs,
    }


def find_function(address: str) -> tuple[Any, str]:
    """Owner and attribute of a function `module:name` or `module:Class.name` of this package."""
    module, _, path = address.partition(":")
    *owners, attribute = path.split(".")
    owner: Any = importlib.import_module(f"..{module}", __package__)
    for name in owners:
        owner = getattr(owner, name)
    return owner, attribute


def _replace(stack: ExitStack, owner: Any, attribute: str, value: Any) -> None:
    stack.callback(setattr, owner, attribute, getattr(owner, attribute))
    setattr(owner, attribute, value)


def _write_trace(target: Any, inputs: Any, arguments: Any, trace: Path) -> None:
    activities = [ProfilerActivity.CPU]
    if target.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with clocked(target.device), profile(activities=activities) as profiler:
        measure(target, inputs, arguments)
    profiler.export_chrome_trace(str(trace))
