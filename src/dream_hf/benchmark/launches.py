"""What decoding asks of a device, counted: operations, compiled graphs, and what crosses between host and device.

On an accelerator a small step costs what its launches cost, and waits at every number that is read back. Both can be counted
on a CPU, where tensors cross nowhere: there a crossing is where Python reads a tensor's numbers, or makes one of a list.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..runtime.phases import DRAFTER, STEP, clocked_by

MARK = "dream_hf: "  # before a phase's name in a trace
OUTSIDE = "outside"  # of all steps
GRAPH = "Torch-Compiled Region"  # PyTorch's name for a call of compiled code
# Operations that set memory aside, or look at what is known on the host; so do those that show numbers anew.
NOT_LAUNCHED = re.compile(
    "(new_)?empty(_like|_strided)?|resize_|set_|detach_|_unsafe_view|item|_local_scalar_dense|is_nonzero|is_same_size|"
    "(promote|result)_types?"
)
# Operations that are one kernel on accelerators, whatever they are made of on a CPU.
KERNELS = re.compile(
    "(add|badd|b)?(b)?mm|cat|index(_copy_|_put_|_select)?|native_layer_norm|rms_norm|sort|topk|_(log_)?softmax|"
    "_scaled_dot_product_(cudnn|efficient|flash)_attention(_for_cpu)?"
)
READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
MAKERS = ("tensor", "as_tensor")


@dataclass
class Launches:
    """What a run asked for, by the innermost phase that was running in a step, or [`OUTSIDE`] one.

    Args:
        operations (`Counter[str]`): Operations that run on the device, those inside compiled graphs left out.
        graphs (`Counter[str]`): Calls of compiled graphs.
        reads (`Counter[str]`): Times that numbers of a tensor were read by Python.
        made (`Counter[str]`): Tensors that were made of numbers of Python's.
        allocated (`Counter[str]`): Bytes set aside, given back or not.
        calls (`Counter[str]`): How often each phase ran.
    """

    operations: Counter[str] = field(default_factory=Counter)
    graphs: Counter[str] = field(default_factory=Counter)
    reads: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    allocated: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    def per_step(self) -> dict[str, dict[str, float]]:
        """Means over the steps, by what is counted and phase, with their `total`."""
        num_steps = max(self.calls[STEP], 1)
        found = {}
        for name, counts in vars(self).items():
            parts = {part: count / num_steps for part, count in counts.items() if part != OUTSIDE}
            found[name] = {**parts, "total": sum(parts.values())}
        return found

    @property
    def per_drafter_forward(self) -> float:
        """Operations of one of the drafter's forwards: a level, or what it reads on."""
        return self.operations[DRAFTER] / max(self.calls[DRAFTER], 1)


def count_launches(run: Callable[[], Any]) -> Launches:
    """What `run`, which decodes, asks of the device."""
    found, running = Launches(), [OUTSIDE]

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        running.append(name if STEP in (*running, name) else OUTSIDE)
        found.calls[running[-1]] += 1
        try:
            with record_function(MARK + running[-1]):
                yield
        finally:
            running.pop()

    activities = [ProfilerActivity.CPU]  # where operations are asked for, whatever device they run on
    with _crossings(lambda kind: getattr(found, kind).update([running[-1]])), clocked_by(clock):
        with profile(activities=activities, profile_memory=True) as trace:
            run()
    for event in trace.events():
        _add(found, event)
    return found


def _add(found: Launches, event: Any) -> None:
    """Count one event of a trace, if it is one that counts."""
    phase, is_inside = _where(event)
    found.allocated[phase] += max(event.self_cpu_memory_usage, 0) + max(event.self_device_memory_usage, 0)
    if event.name.startswith(GRAPH):
        found.graphs[phase] += not is_inside
    elif not is_inside:
        found.operations[phase] += _is_launch(event)


def _is_launch(event: Any) -> bool:
    """Whether an event of a trace is an operation that runs on the device, by itself."""
    name = _operation(event)
    if KERNELS.fullmatch(name):
        return True
    if not name or NOT_LAUNCHED.fullmatch(name) or _is_view(name):
        return False
    return not any(map(_launches, event.cpu_children))


def _launches(event: Any) -> bool:
    """Whether an event, or what it is made of, runs anything on the device."""
    return _is_launch(event) or any(map(_launches, event.cpu_children))


@cache
def _is_view(name: str) -> bool:
    """Whether an operation returns what it is given, or a view of it, unless it is made of others."""
    packet = getattr(torch.ops.aten, name, None)
    returned = [] if packet is None else getattr(packet, packet.overloads()[0])._schema.returns
    return any(each.alias_info is not None and not each.alias_info.is_write for each in returned)


def _operation(event: Any) -> str:
    """The name of an operation of PyTorch's, else nothing."""
    return event.name.removeprefix("aten::") if event.name.startswith("aten::") else ""


def _where(event: Any) -> tuple[str, bool]:
    """The innermost phase around an event, and whether it is inside of compiled code, or of a kernel."""
    is_inside = False
    while (event := event.cpu_parent) is not None:
        is_inside |= event.name.startswith(GRAPH) or bool(KERNELS.fullmatch(_operation(event)))
        if event.name.startswith(MARK):
            return event.name.removeprefix(MARK), is_inside
    return OUTSIDE, is_inside


@contextmanager
def _crossings(note: Callable[[str], None]) -> Iterator[None]:
    """While in the block, `note` hears "reads" when numbers of a tensor are read, and "made" when one is made of numbers."""
    depth = [0]  # of calls that call each other

    def noted(function: Callable, kind: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            is_outermost = not depth[0] and not torch.compiler.is_compiling()
            if is_outermost and not (kind == "made" and isinstance(args[0], torch.Tensor)):
                note(kind)
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    with ExitStack() as stack:
        for owner, names, kind in ((torch.Tensor, READS, "reads"), (torch, MAKERS, "made")):
            for name in names:
                stack.enter_context(patch.object(owner, name, noted(getattr(owner, name), kind)))
        yield
