"""Key/value caches with shapes that compiled code can rely on; see `caches` for what slots are.

Compiled code must not read a number that changes from step to step, or it is compiled anew. So a layer's buffers have
room for what is to come, all of which is returned to the attention, whose mask cuts; and where a row stands is read from
tensors that are written in place before a forward. Keeping a path waits for the next forward and happens inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from .kv_cache import SlotLayer, Slots, restore

BUCKET = 256  # capacities are multiples of it, so that few shapes occur
SPARE_SLOTS = 256


@dataclass(frozen=True)
class Pointers:
    """Where rows stand, on one device, as compiled code sees it.

    Args:
        starts (`torch.LongTensor` of shape `(B,)`): The slot that each row writes next.
        end (`torch.LongTensor` of shape `()`): First slot that no row uses.
        moved_from, moved_to (`torch.LongTensor` of shape `(B, P)`): Slots to be moved before anything is written.
    """

    starts: torch.Tensor
    end: torch.Tensor
    moved_from: torch.Tensor
    moved_to: torch.Tensor


class StaticSlots(Slots):
    """[`Slots`] that are mirrored on the device.

    Args:
        lengths (`Sequence[int]`): Verified slots of each row.
        limit (`int`, *optional*): Slots that will never be exceeded.
        path_size (`int`): Longest path that is ever kept; 0 if none is.
    """

    def __init__(self, lengths: Sequence[int], limit: int | None = None, path_size: int = 0):
        self.path_size = path_size
        self._pointers: dict[torch.device, Pointers] = {}
        super().__init__(lengths, limit)

    def place(self, lengths: Sequence[int]) -> None:
        """Set the verified slots of each row."""
        super().place(lengths)
        for device, pointers in self._pointers.items():
            pointers.starts.copy_(self.tensor(device))
            pointers.end.fill_(self.longest)

    def extend(self, num_slots: int) -> None:
        """Take note of `num_slots` tentative slots written by a forward pass, in every layer."""
        super().extend(num_slots)
        for pointers in self._pointers.values():
            pointers.starts.add_(num_slots)

    def commit(self, counts: Sequence[int]) -> None:
        """Verify the first `counts` tentative slots of each row and take the others back."""
        self.rollback()
        super().commit(counts)

    def rollback(self) -> None:
        """Take all tentative slots back."""
        if not self.tentative:
            return
        super().rollback()
        for device, pointers in self._pointers.items():
            pointers.starts.copy_(self.tensor(device))

    def pointers(self, device: torch.device) -> Pointers:
        """The tensors for layers on a device; the same ones as long as these slots are used."""
        if device not in self._pointers:
            starts = self.tensor(device).clone()
            path = starts[:, None].expand(-1, self.path_size)
            self._pointers[device] = Pointers(
                starts, torch.tensor(self.longest, device=device), path.clone(), path.clone()
            )
        return self._pointers[device]

    def keep(self, path: torch.Tensor) -> None:
        """Let the next forward move the tentative slots `path` (B, P) to the first P tentative slots.

        Paths are shorter than `path_size`, or as long; node 0, where they start, stays where it is.
        """
        missing = self.path_size - path.shape[1]
        for device, pointers in self._pointers.items():
            here = torch.nn.functional.pad(path.to(device), (0, missing))
            steps = torch.arange(path.shape[1], device=device)
            pointers.moved_from.copy_(pointers.starts[:, None] + here)
            pointers.moved_to.copy_(pointers.starts[:, None] + torch.nn.functional.pad(steps, (0, missing)))

    def settle(self) -> None:
        """Take note that every layer has made its move."""
        for pointers in self._pointers.values():
            pointers.moved_from.copy_(pointers.moved_to)


class StaticSlotLayer(SlotLayer):
    """A [`SlotLayer`] whose `update` can be compiled: it reads tensors only, and returns its whole buffers.

    Slots that lie outside a sliding window when the layer is made are left out; from then on none is dropped.

    Args:
        slots (`StaticSlots`): Where rows stand.
        sliding_window (`int`, *optional*): Tokens a query sees.
        is_dynamic (`bool`): Let code that is compiled for these buffers serve any other capacity, too.
    """

    is_compileable = True
    slots: StaticSlots

    def __init__(self, slots: StaticSlots, sliding_window: int | None = None, is_dynamic: bool = False):
        super().__init__(slots, sliding_window)
        self.is_dynamic = is_dynamic
        self.first: torch.Tensor | None = None  # `dropped` as a tensor, where it is not 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make empty buffers for states of this kind."""
        super().lazy_initialization(key_states, value_states)
        self.pointers = self.slots.pointers(self.device)
        self.reserve(0)

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, dropped: int, num_new: int) -> None:
        """Start with the verified `keys` and `values` (B, heads, K, head_dim), whose first slot is `dropped`."""
        super().lazy_initialization(keys, values)
        self.pointers = self.slots.pointers(self.device)
        self.keys, self.values, self.dropped = keys, values, dropped
        self.first = torch.tensor(dropped, device=self.device) if self.is_sliding else None
        self._grow(num_new)

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` slots; not to be compiled."""
        if self.slots.end + num_new - self.dropped > self.keys.shape[2] or not self.keys.shape[2]:
            self._grow(num_new)

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values behind each row's last slot; return the buffers, (B, heads, capacity, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pointers, num_moved = self.pointers, self.slots.path_size
        num_new = key_states.shape[2]
        new = self._inside(pointers.starts[:, None] + torch.arange(num_new, device=self.keys.device))
        source, destination = self._inside(pointers.moved_from), self._inside(pointers.moved_to)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            if num_moved > 1:
                _write(buffer, destination, _read(buffer, source))
            _write(buffer, new, states.to(buffer.dtype))
        return self.keys, self.values

    def move(self) -> None:
        """Make the move that waits for the next forward."""
        if self.slots.path_size > 1:
            source, destination = self._inside(self.pointers.moved_from), self._inside(self.pointers.moved_to)
            for buffer in (self.keys, self.values):
                _write(buffer, destination, _read(buffer, source))

    def get_seq_length(self) -> torch.Tensor:  # type: ignore[override]
        return self.pointers.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], self.dropped

    def _inside(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots lie in the buffers."""
        return slots if self.first is None else slots - self.first

    def _grow(self, num_new: int) -> None:
        needed = self.slots.end + num_new
        capacity = needed + max(SPARE_SLOTS, needed // 4)
        if self.slots.limit is not None:
            capacity = max(needed, min(capacity, self.slots.limit))
        capacity = -(-(capacity - self.dropped) // BUCKET) * BUCKET
        self.keys, self.values = (self._buffer(states, capacity) for states in (self.keys, self.values))

    def _buffer(self, states: torch.Tensor, capacity: int) -> torch.Tensor:
        buffer = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
        buffer[:, :, : states.shape[2]] = (
            states  # with what is still to be moved, which lies behind the verified slots
        )
        if self.is_dynamic:
            torch._dynamo.maybe_mark_dynamic(buffer, 2)
        elif buffer.device.type != "cpu":  # a graph of device calls writes to addresses, not to tensors
            torch._dynamo.mark_static_address(buffer, guard=False)
        return buffer


def static_cache(slots_of_layers: Sequence[StaticSlots], empty: torch.Tensor) -> Cache:
    """As [`slot_cache`], with [`StaticSlotLayer`]s for keys and values like `empty` (B, heads, 0, head_dim)."""
    layers: list[Any] = [StaticSlotLayer(slots, is_dynamic=empty.device.type == "cpu") for slots in slots_of_layers]
    for layer in layers:
        layer.lazy_initialization(empty, empty)
    return Cache(layers=layers)


@contextmanager
def static_layers(
    cache: Cache, slots: StaticSlots, num_new: int, is_dynamic: bool = False
) -> Iterator[list[StaticSlotLayer]]:
    """As [`slot_layers`], with [`StaticSlotLayer`]s that have room for `num_new` tentative slots to start with."""
    originals: list[Any] = list(cache.layers)
    adopted: dict[int, StaticSlotLayer] = {}
    for index, layer in enumerate(originals):
        if layer.keys is None:
            continue
        window = getattr(layer, "sliding_window", None)
        adopted[index] = StaticSlotLayer(slots, window, is_dynamic)
        adopted[index].adopt(layer.keys, layer.values, layer.get_seq_length() - layer.keys.shape[2], num_new)
        layer.keys = layer.values = None  # one owner at a time
        cache.layers[index] = adopted[index]
    try:
        yield list(adopted.values())
    finally:
        for index, layer in adopted.items():
            layer.move()
            restore(layer, originals[index])
        cache.layers[:] = originals


def _read(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The states in `slots` (B, P) of a buffer (B, heads, capacity, head_dim): (B, heads, P, head_dim)."""
    if slots.shape[0] == 1:
        return buffer.index_select(2, slots[0])
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    return buffer[rows, :, slots].transpose(1, 2)


def _write(buffer: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
    """Put `states` (B, heads, P, head_dim) into `slots` (B, P) of a buffer, in place."""
    if slots.shape[0] == 1:
        buffer.index_copy_(2, slots[0], states)
        return
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    buffer[rows, :, slots] = states.transpose(1, 2)
