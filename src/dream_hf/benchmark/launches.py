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

from ..runtime.phases import STEP, clocked_by

MARK, LINK = "dream_hf: ", " > "  # before and between the names of phases in a trace
GRAPH = "Torch-Compiled Region"  # PyTorch's name for a call of compiled code
# Operations that set memory aside, or look at what is known on the host; so do those that show numbers anew.
NOT_LAUNCHED = re.compile(
    "(new_)?empty(_like|_strided)?|resize_|set_|detach_|_unsafe_view|item|_local_scalar_dense|is_nonzero|is_same_size|"
    "(promote|result)_types?"
)
# Operations that are one kernel on accelerators, whatever they are made of on a CPU.
KERNELS = re.compile(
    "(add|badd|b)?mm|cat|index(_copy_|_put_|_select)?|native_layer_norm|rms_norm|gather|scatter|sort|topk|_?(log_)?softmax|"
    "_scaled_dot_product_(cudnn|efficient|flash)_attention(_for_cpu)?"
)
READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__")
MAKERS = ("tensor", "as_tensor")

Path = tuple[str, ...]  # the phases that are running, the outermost first


@dataclass
class Launches:
    """What a run asked for, by the phases that were running.

    Args:
        operations (`Counter[Path]`): Operations that run on the device, those inside compiled graphs left out.
        graphs (`Counter[Path]`): Calls of compiled graphs.
        reads (`Counter[Path]`): Times that Python read numbers of a tensor.
        made (`Counter[Path]`): Tensors made of Python's numbers.
        allocated (`Counter[Path]`): Bytes set aside, given back or not.
        calls (`Counter[Path]`): How often the innermost of the phases ran.
    """

    operations: Counter[Path] = field(default_factory=Counter)
    graphs: Counter[Path] = field(default_factory=Counter)
    reads: Counter[Path] = field(default_factory=Counter)
    made: Counter[Path] = field(default_factory=Counter)
    allocated: Counter[Path] = field(default_factory=Counter)
    calls: Counter[Path] = field(default_factory=Counter)

    def per_step(self, kind: str, within: str = STEP) -> float:
        """How much of a kind of count a step has in its phase `within`, whatever runs inside that."""
        counts: Counter[Path] = getattr(self, kind)
        return sum(n for path, n in counts.items() if path[:1] == (STEP,) and within in path) / max(self.num_steps, 1)

    def by_phase(self) -> dict[str, dict[str, float]]:
        """What a step has of each kind, by the innermost phase."""
        found: dict[str, dict[str, float]] = {}
        for kind, counts in vars(self).items():
            parts: Counter[str] = Counter()
            for path, count in counts.items():
                if path[:1] == (STEP,):
                    parts[path[-1]] += count
            found[kind] = {part: count / max(self.num_steps, 1) for part, count in parts.items()}
        return found

    @property
    def num_steps(self) -> int:
        """Steps that were taken."""
        return self.calls[(STEP,)]


def count_launches(run: Callable[[], Any]) -> Launches:
    """What `run`, which decodes, asks of the device."""
    found, running = Launches(), [Path()]

    @contextmanager
    def clock(name: str) -> Iterator[None]:
        running.append((*running[-1], name))
        found.calls[running[-1]] += 1
        try:
            with record_function(MARK + LINK.join(running[-1])):
                yield
        finally:
            running.pop()

    def note(kind: str) -> None:
        getattr(found, kind)[running[-1]] += 1

    # Operations are asked for on the CPU, whatever device they run on.
    with _crossings(note), clocked_by(clock), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    for event in trace.events():
        _add(found, event)
    return found


def _add(found: Launches, event: Any) -> None:
    """Count one event of a trace, if it is one that counts."""
    path, is_inside = _where(event)
    found.allocated[path] += max(event.self_cpu_memory_usage, 0) + max(event.self_device_memory_usage, 0)
    if event.name.startswith(GRAPH):
        found.graphs[path] += not is_inside
    elif not is_inside:
        found.operations[path] += _is_launch(event)


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


def _where(event: Any) -> tuple[Path, bool]:
    """The phases around an event, and whether it is inside of compiled code, or of a kernel."""
    is_inside = False
    while (event := event.cpu_parent) is not None:
        is_inside |= event.name.startswith(GRAPH) or bool(KERNELS.fullmatch(_operation(event)))
        if event.name.startswith(MARK):
            return tuple(event.name.removeprefix(MARK).split(LINK)), is_inside
    return (), is_inside


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
