"""Key/value caches that draft trees can be written into and taken back from; see `slots` for who writes where.

Keeping a path moves a few tentative slots; taking the rest back is changing a number. Buffers grow when they are full and
show what is filled; or, for compiled code, which relies on shapes, they are fixed and lie in a lease: they have room for what
is to come, all of which is shown to the attention, whose mask cuts, and keeping a path waits for the next forward and happens
inside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from .phases import CACHE_WORK, phase
from .slots import Pointers, Slots

SPARE_SLOTS = 64  # that buffers grow by at least
FIXED_SPARE_SLOTS = 256  # the same for fixed ones
BUCKET = 256  # the smallest capacity of fixed buffers; there are two to every doubling, so that few shapes occur
SHOWN_BY = 64  # compiled code on a CPU, which serves all sizes, sees a multiple of these slots
# Layers a tree can be taken back from. Layers that only read other layers' keys have had a type since transformers 5.23.
SUPPORTED_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    getattr(cache_utils, "DummyLayer", DynamicLayer),
)


class SlotLayer(DynamicLayer):
    """Keys and values of one layer in buffers that are written in place and grow by a quarter when full.

    With a sliding window only the slots that a query may still see are returned, and slots that none can see are
    dropped when the buffer is full, so that it stays within a small multiple of the window. Fixed buffers leave out what lies
    outside the window when the layer is made; from then on no slot is dropped.

    Buffers are fixed where the slots have a lease. `update` can be compiled then: it reads tensors only, and returns whole
    buffers, which [`SlotLayer.reserve`] made large enough.

    Args:
        slots (`Slots`): Where rows stand.
        sliding_window (`int`, *optional*): Tokens a query sees.
        name (`str`): What tells the layer from others of the same lease.
    """

    keys: torch.Tensor  # type: ignore[assignment]
    values: torch.Tensor  # type: ignore[assignment]
    pointers: Pointers  # of fixed buffers

    def __init__(self, slots: Slots, sliding_window: int | None = None, name: str = "layer"):
        super().__init__()
        self.slots, self.sliding_window, self.name = slots, sliding_window, name
        self.is_sliding = sliding_window is not None
        self.is_fixed = self.is_compileable = slots.lease is not None
        self.dropped = 0  # slots before the first one in the buffers
        self.first: torch.Tensor | None = None  # the same for compiled code, where it is not 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make empty buffers for states of this kind."""
        self.adopt(key_states[:, :, :0], value_states[:, :, :0])

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, dropped: int = 0, num_new: int = 0) -> None:
        """Start with verified keys and values (B, heads, K, head_dim), the first of which are in slot `dropped`."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.dropped = keys, values, dropped
        self.is_initialized = True
        if self.is_fixed:
            self.pointers = self.slots.pointers(self.device)
            if self.is_sliding:
                assert self.slots.lease is not None  # it is fixed
                self.first = self.slots.lease.buffer(f"{self.name}.first", self.pointers.end, ())
                self.first.fill_(dropped)
            self._grow(self.slots.end + num_new - dropped)

    def reserve(self, num_new: int) -> None:
        """Make room for `num_new` slots, dropping what has left the window and growing the buffers if need be."""
        needed = self.slots.end + num_new - self.dropped
        if needed > self.keys.shape[2] or not self.keys.shape[2]:
            self._grow(needed)

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values behind each row's last slot; return all that is visible, (B, heads, K, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[2]
        if self.is_fixed:
            self.move()
            new = self._inside(self.pointers.starts[:, None] + torch.arange(num_new, device=self.keys.device))
            _write(self.keys, new, key_states)
            _write(self.values, new, value_states)
            return self.keys, self.values
        with phase(CACHE_WORK):
            self.reserve(num_new)
            self._append(self.keys, key_states)
            self._append(self.values, value_states)
        visible = slice(self.first_visible - self.dropped, self.slots.end + num_new - self.dropped)
        return self.keys[:, :, visible], self.values[:, :, visible]

    def keep(self, path: torch.Tensor) -> None:
        """Move the tentative slots `path` (B, P) to the first P tentative slots. Paths start at node 0, which stays.

        In fixed buffers this is a matter of the slots, and of the next forward.
        """
        num_kept = path.shape[1]
        if path.shape[0] == 1:  # fewer and cheaper operations than for rows that differ
            first = self.slots.longest - self.dropped
            source = path[0].to(self.keys.device) + first
            for buffer in (self.keys, self.values):
                buffer[:, :, first : first + num_kept] = buffer.index_select(2, source)
            return
        start = self.slots.tensor(self.keys.device)[:, None] - self.dropped
        source = start + path.to(self.keys.device)
        self._move(source, start + torch.arange(num_kept, device=self.keys.device))

    def clear(self) -> None:
        """Put zeros into the tentative slots: a key that nobody sees must not be NaN, since nothing times NaN is NaN."""
        num_slots = self.slots.tentative
        self.reserve(0)  # not all layers have written there
        first = self.slots.tensor(self.keys.device)[:, None] - self.dropped
        places = first + torch.arange(num_slots, device=self.keys.device)
        for buffer in (self.keys, self.values):
            _write(buffer, places, buffer.new_zeros(*buffer.shape[:2], num_slots, buffer.shape[3]))

    def move(self) -> None:
        """Make the move that waits for the next forward, in fixed buffers."""
        if self.is_fixed and self.slots.path_size > 1:
            self._move(self._inside(self.pointers.moved_from), self._inside(self.pointers.moved_to))

    def leave_inference_mode(self) -> None:
        """Let buffers made in `torch.inference_mode()` be written outside it, by copying them."""
        if self.is_initialized and self.keys.is_inference():
            if self.is_fixed:
                self.pointers = self.slots.pointers(self.device)
                self._move_to_fixed(self.keys.shape[2])
            else:
                self.keys, self.values = self.keys.clone(), self.values.clone()

    @property
    def first_visible(self) -> int:
        """First slot that the next query of some row may see."""
        if self.sliding_window is None:
            return 0
        return max(self.slots.shortest - self.sliding_window + 1, self.dropped)

    def get_seq_length(self) -> int:
        return self.pointers.end if self.is_fixed else self.slots.end  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if self.is_fixed:
            return self.keys.shape[2], self.dropped
        return self.slots.end + query_length - self.first_visible, self.first_visible

    def _inside(self, slots: torch.Tensor) -> torch.Tensor:
        """Where slots lie in the buffers."""
        return slots if self.first is None else slots - self.first

    def _append(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        num_new, device = states.shape[2], buffer.device
        if self.slots.longest == self.slots.shortest:
            start = self.slots.end - self.dropped
            buffer[:, :, start : start + num_new] = states
            return
        first = self.slots.tensor(device)[:, None] + (self.slots.tentative - self.dropped)
        _write(buffer, first + torch.arange(num_new, device=device), states)

    def _move(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        for buffer in (self.keys, self.values):
            _write(buffer, destination, _read(buffer, source))

    def _grow(self, needed: int) -> None:
        """Move to buffers of at least `needed` slots, less those that no query can see any more."""
        passed = 0 if self.is_fixed else self.first_visible - self.dropped
        needed -= passed
        capacity = needed + max(FIXED_SPARE_SLOTS if self.is_fixed else SPARE_SLOTS, needed // 4)
        if self.slots.limit is not None:
            capacity = max(needed, min(capacity, self.slots.limit - self.dropped - passed))
        if self.is_fixed:
            return self._move_to_fixed(capacity_for(capacity))
        self.keys, self.values = (_enlarged(states[:, :, passed:], capacity) for states in (self.keys, self.values))
        self.dropped += passed

    def _move_to_fixed(self, capacity: int) -> None:
        """Move to buffers of the lease with at least `capacity` slots, what is yet to be moved among them."""
        lease = self.slots.lease
        assert lease is not None  # it is fixed
        for name in ("keys", "values"):
            states = getattr(self, name)
            shape = (*states.shape[:2], capacity, states.shape[3])
            buffer = lease.buffer(f"{self.name}.{name}", states, shape, dim=2)
            buffer[:, :, : states.shape[2]] = states
            if buffer.device.type == "cpu":  # let code that is compiled for it serve any other capacity
                torch._dynamo.maybe_mark_dynamic(buffer, 2)
            setattr(self, name, buffer)


def capacity_for(num_slots: int) -> int:
    """The capacity of fixed buffers with room for as many slots: one and a half times a power of two, or the next one."""
    capacity = BUCKET
    while capacity < num_slots:
        capacity = capacity * 4 // 3 if capacity % 3 == 0 else capacity * 3 // 2
    return capacity


def few_sizes(num_slots: int, device: torch.device) -> int:
    """How many slots to show compiled code, at least `num_slots`: few numbers, so that it is compiled for few."""
    return -(-num_slots // SHOWN_BY) * SHOWN_BY if device.type == "cpu" else capacity_for(num_slots)


def _enlarged(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """`states` (B, heads, K, head_dim) at the start of a new buffer."""
    buffer = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer


def slot_cache(slots_of_layers: Sequence[Slots], like: torch.Tensor | None = None) -> Cache:
    """An empty cache with one layer for each entry, standing where that entry says.

    Where the slots have a lease it has to be told what keys and values are `like`, (B, heads, 0, head_dim).
    """
    layers = [SlotLayer(slots, name=f"{slots.name}.{index}") for index, slots in enumerate(slots_of_layers)]
    if like is not None:
        for layer in layers:
            layer.lazy_initialization(like, like)
    return Cache(layers=layers)  # type: ignore[arg-type]


def leave_inference_mode(cache: Cache) -> None:
    """Let a [`slot_cache`] whose buffers were made in `torch.inference_mode()` be written outside it."""
    if not torch.is_inference_mode_enabled():
        layers: list[Any] = list(cache.layers)
        for layer in layers:
            layer.leave_inference_mode()


@contextmanager
def slot_layers(cache: Cache, slots: Slots, room: int = 0, is_kept: bool = True) -> Iterator[list[SlotLayer]]:
    """Let a prefilled cache keep its keys and values in [`SlotLayer`]s while in the block.

    On the way out, by whatever way, the cache gets its own layers back, holding exactly the verified slots, as if the
    tokens had come one by one.

    Args:
        cache (`Cache`): The cache.
        slots (`Slots`): Where its rows stand.
        room (`int`): Tentative slots that there is room for to start with, in buffers that are fixed.
        is_kept (`bool`): Whether anybody looks at the cache afterwards; else what it holds may be overwritten.
    """
    originals: list[Any] = list(cache.layers)
    adopted = into_slots(cache, slots, room)
    try:
        yield list(adopted.values())
    finally:
        for index, layer in adopted.items():
            restore(layer, originals[index])
            if is_kept and layer.is_fixed:  # the buffers go back to the lease
                originals[index].keys, originals[index].values = (
                    originals[index].keys.clone(),
                    originals[index].values.clone(),
                )
        cache.layers[:] = originals


def into_slots(cache: Cache, slots: Slots, room: int = 0) -> dict[int, SlotLayer]:
    """Let a prefilled cache keep its keys and values in [`SlotLayer`]s from here on; they are returned by their places."""
    adopted: dict[int, SlotLayer] = {}
    originals: list[Any] = list(cache.layers)
    for index, layer in enumerate(originals):
        if getattr(layer, "keys", None) is not None:
            window = getattr(layer, "sliding_window", None)
            adopted[index] = cache.layers[index] = SlotLayer(slots, window, str(index))
            _adopt(adopted[index], layer, room)
    return adopted


def unsupported_layer(cache: Cache) -> str | None:
    """Name of the first layer type a tree cannot be taken back from, or None."""
    return next((type(layer).__name__ for layer in cache.layers if type(layer) not in SUPPORTED_LAYERS), None)


def _adopt(layer: SlotLayer, original: Any, num_new: int) -> None:
    """Let `layer` take over what the cache's own holds; one owner, so that a buffer that is grown can be freed."""
    keys, values, dropped = original.keys, original.values, original.get_seq_length() - original.keys.shape[2]
    original.keys = original.values = None
    layer.adopt(keys, values, dropped, num_new)


def restore(layer: SlotLayer, original: Any) -> None:
    """Give a cache's own layer the verified slots of the one that stood in for it."""
    layer.move()
    slots = layer.slots
    first = layer.dropped
    if layer.sliding_window is not None:
        first = max(first, slots.longest - layer.sliding_window + 1)
        original.cumulative_length = slots.longest
    kept = slice(first - layer.dropped, slots.longest - layer.dropped)
    original.keys, original.values = layer.keys[:, :, kept], layer.values[:, :, kept]
    for row, length in enumerate(slots.lengths):
        if length < slots.longest:  # a shorter row: what lies behind its end was never verified
            original.keys[row, :, max(length - first, 0) :] = 0
            original.values[row, :, max(length - first, 0) :] = 0


def _read(buffer: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The states in `slots` (B, P) of a buffer (B, heads, capacity, head_dim): (B, heads, P, head_dim)."""
    if slots.shape[0] == 1:
        return buffer.index_select(2, slots[0])
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    return buffer[rows, :, slots].transpose(1, 2)


def _write(buffer: torch.Tensor, slots: torch.Tensor, states: torch.Tensor) -> None:
    """Put `states` (B, heads, P, head_dim) into `slots` (B, P) of a buffer, in place; autocast may have changed their dtype."""
    states = states.to(buffer.dtype)
    if slots.shape[0] == 1:
        buffer.index_copy_(2, slots[0], states)
        return
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    buffer[rows, :, slots] = states.transpose(1, 2)
