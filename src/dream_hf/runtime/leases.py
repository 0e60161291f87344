"""Buffers that outlive a call: who decodes borrows them from the model's pool, and gives them back.

Compiled code and graphs of device calls are tied to shapes and addresses. The second call of one shape finds the buffers of
the first, so that nothing is allocated, recorded or compiled again. Every call has a lease of its own, whatever the thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

MOST_IDLE = 2  # leases that a model's pool keeps for later calls; those that have waited longest go first


class Lease:
    """Buffers of one call, by names.

    Args:
        key (`Hashable`): What kind of call it fits: its rows, its size.
    """

    def __init__(self, key: Hashable):
        self.key = key
        self.buffers: dict[str, torch.Tensor] = {}

    def buffer(self, name: str, like: torch.Tensor, shape: tuple[int, ...], dim: int | None = None) -> torch.Tensor:
        """The buffer of a name, all zeros when the call began; another one where it does not fit.

        Args:
            name (`str`): Its name.
            like (`torch.Tensor`): Has its dtype and device.
            shape (`tuple[int, ...]`): Its shape.
            dim (`int`, *optional*): The dimension that may be larger than `shape` says.
        """
        buffer = self.buffers.get(name)
        if buffer is None or not _fits(buffer, like, shape, dim):
            self.buffers[name] = buffer = torch.zeros(shape, dtype=like.dtype, device=like.device)
            if like.device.type != "cpu":  # a graph of device calls reads and writes addresses, not tensors
                torch._dynamo.mark_static_address(buffer, guard=False)
        return buffer

    def clean(self) -> None:
        """Fill all buffers with zeros: what is left in them is masked, but a NaN would pass a mask."""
        with torch.inference_mode():
            for buffer in self.buffers.values():
                buffer.zero_()


def _fits(buffer: torch.Tensor, like: torch.Tensor, shape: tuple[int, ...], dim: int | None) -> bool:
    is_writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
    sizes = [(have, want) for place, (have, want) in enumerate(zip(buffer.shape, shape, strict=True)) if place != dim]
    is_shaped = all(have == want for have, want in sizes) and (dim is None or buffer.shape[dim] >= shape[dim])
    return is_writable and is_shaped and (buffer.dtype, buffer.device) == (like.dtype, like.device)


_idle: WeakKeyDictionary[nn.Module, list[Lease]] = WeakKeyDictionary()
_lock = threading.RLock()  # an owner may be freed while its thread holds it


def take_lease(model: nn.Module, *key: Hashable) -> Lease:
    """A lease that nobody else has: one that an earlier call of the same kind gave back, or a new one."""
    with _lock:
        idle = _idle.setdefault(model, [])
        place = next((place for place, lease in enumerate(idle) if lease.key == key), None)
        lease = Lease(key) if place is None else idle.pop(place)
    lease.clean()
    return lease


def give_back(model: nn.Module, lease: Lease) -> None:
    """Keep a lease for later calls."""
    with _lock:
        idle = _idle.setdefault(model, [])
        idle.append(lease)
        del idle[:-MOST_IDLE]


def lease_for_life(owner: Any, model: nn.Module, *key: Hashable) -> Lease:
    """A lease that `owner` gives back when it is freed."""
    lease = take_lease(model, *key)
    weakref.finalize(owner, _give_back_to, weakref.ref(model), lease).atexit = False
    return lease


def _give_back_to(model: weakref.ref[nn.Module], lease: Lease) -> None:
    found = model()
    if found is not None:
        give_back(found, lease)


def idle_leases(model: nn.Module) -> list[Lease]:
    """The leases that wait for a call."""
    with _lock:
        return list(_idle.get(model, []))
