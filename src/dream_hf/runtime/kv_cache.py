"""Key/value caches that draft trees can be written into and taken back from.

A row's first slots hold verified tokens, one slot for each, in order; the slots after them are tentative. Rows may have
different numbers of verified slots: a row always writes right behind its own. Keeping a path moves a few tentative slots;
taking the rest back is changing a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .phases import CACHE_WORK, phase

MIN_SPARE_SLOTS = 64
# Layers a tree can be taken back from. Layers that only read other layers' keys have had a type since transformers 5.23.
SUPPORTED_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, getattr(cache_utils, "DummyLayer", DynamicLayer))


class Slots:
    """Where the rows of a batch stand, shared by the layers of a cache.

    Args:
        lengths (`Sequence[int]`): Verified slots of each row.
        limit (`int`, *optional*): Slots that will never be exceeded, so that buffers need not grow past it.
    """

    def __init__(self, lengths: Sequence[int], limit: int | None = None):
        self.limit = limit
        self.tentative = 0  # slots after the verified ones that hold something, equal for all rows
        self.place(lengths)

    def place(self, lengths: Sequence[int]) -> None:
        """Set the verified slots of each row."""
        self.lengths = list(lengths)
        self.longest, self.shortest = max(self.lengths), min(self.lengths)
        self._tensors: dict[torch.device, torch.Tensor] = {}

    @property
    def end(self) -> int:
        """First slot that no row uses."""
        return self.longest + self.tentative

    def tensor(self, device: torch.device) -> torch.Tensor:
        """`lengths` on a device, (B,)."""
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.lengths, device=device)
        return self._tensors[device]

    def extend(self, num_slots: int) -> None:
        """Take note of `num_slots` tentative slots written by a forward pass, in every layer."""
        self.tentative += num_slots

    def commit(self, counts: Sequence[int]) -> None:
        """Verify the first `counts` tentative slots of each row and take the others back."""
        self.tentative = 0
        if any(counts):
            self.place([length + count for length, count in zip(self.lengths, counts, strict=True)])

    def rollback(self) -> None:
        """Take all tentative slots back."""
        self.tentative = 0


class SlotLayer(DynamicLayer):
    """Keys and values of one layer in buffers that are written in place and grow by a quarter when full.

    With a sliding window only the slots that a query may still see are returned, and slots that none can see are
    dropped when the buffer is full, so that it stays within a small multiple of the window.
    """

    keys: torch.Tensor  # type: ignore[assignment]
    values: torch.Tensor  # type: ignore[assignment]

    def __init__(self, slots: Slots, sliding_window: int | None = None):
        super().__init__()
        self.slots = slots
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.dropped = 0  # slots before the first one in the buffers

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0]
        self.values = value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values behind each row's last slot; return all that is visible, (B, heads, K, head_dim)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_new = key_states.shape[-2]
        with phase(CACHE_WORK):
            self._reserve(num_new)
            self._write(self.keys, key_states)
            self._write(self.values, value_states)
        visible = slice(self.first_visible - self.dropped, self.slots.end + num_new - self.dropped)
        return self.keys[:, :, visible], self.values[:, :, visible]

    def keep(self, path: torch.Tensor) -> None:
        """Move the tentative slots `path` (B, P) to the first P tentative slots. Paths start at node 0, which stays."""
        num_kept = path.shape[1]
        if path.shape[0] == 1:  # fewer and cheaper operations than for rows that differ
            first = self.slots.longest - self.dropped
            source = path[0].to(self.keys.device) + first
            for buffer in (self.keys, self.values):
                buffer[:, :, first : first + num_kept] = buffer.index_select(2, source)
            return
        start = self.slots.tensor(self.keys.device)[:, None] - self.dropped
        source = start + path.to(self.keys.device)
        destination = start + torch.arange(num_kept, device=self.keys.device)
        for buffer in (self.keys, self.values):
            kept = buffer.gather(2, _per_head(source, buffer))
            buffer.scatter_(2, _per_head(destination, buffer), kept)

    def leave_inference_mode(self) -> None:
        """Let buffers made in `torch.inference_mode()` be written outside it, by copying them."""
        if self.is_initialized and self.keys.is_inference():
            self.keys, self.values = self.keys.clone(), self.values.clone()

    @property
    def first_visible(self) -> int:
        """First slot that the next query of some row may see."""
        if self.sliding_window is None:
            return 0
        return max(self.slots.shortest - self.sliding_window + 1, self.dropped)

    def get_seq_length(self) -> int:
        return self.slots.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots.end + query_length - self.first_visible, self.first_visible

    def _write(self, buffer: torch.Tensor, states: torch.Tensor) -> None:
        num_new, states = states.shape[2], states.to(buffer.dtype)  # which autocast may have changed
        if self.slots.longest == self.slots.shortest:
            start = self.slots.end - self.dropped
            buffer[:, :, start : start + num_new] = states
            return
        first = self.slots.tensor(buffer.device)[:, None] + (self.slots.tentative - self.dropped)
        buffer.scatter_(2, _per_head(first + torch.arange(num_new, device=buffer.device), states), states)

    def _reserve(self, num_new: int) -> None:
        """Make room for `num_new` slots, dropping what has left the window and growing the buffers if need be."""
        needed = self.slots.end + num_new - self.dropped
        if needed <= self.keys.shape[2]:
            return
        passed = self.first_visible - self.dropped
        filled = min(self.slots.end - self.dropped, self.keys.shape[2])
        needed -= passed
        capacity = needed + max(MIN_SPARE_SLOTS, needed // 4)
        if self.slots.limit is not None:
            capacity = max(needed, min(capacity, self.slots.limit - self.dropped - passed))
        self.keys = _moved(self.keys[:, :, passed:filled], capacity)
        self.values = _moved(self.values[:, :, passed:filled], capacity)
        self.dropped += passed


def slot_cache(slots_of_layers: Sequence[Slots]) -> Cache:
    """An empty cache with one layer for each entry, standing where that entry says."""
    return Cache(layers=[SlotLayer(slots) for slots in slots_of_layers])


@contextmanager
def slot_layers(cache: Cache, slots: Slots) -> Iterator[list[SlotLayer]]:
    """Let a prefilled cache keep its keys and values in [`SlotLayer`]s while in the block.

    On the way out, by whatever way, the cache gets its own layers back, holding exactly the verified slots, as if the
    tokens had come one by one.
    """
    originals: list[Any] = list(cache.layers)
    adopted = {index: _adopt(layer, slots) for index, layer in enumerate(originals) if layer.keys is not None}
    for index, layer in adopted.items():
        cache.layers[index] = layer
    try:
        yield list(adopted.values())
    finally:
        for index, layer in adopted.items():
            restore(layer, originals[index])
        cache.layers[:] = originals


def unsupported_layer(cache: Cache) -> str | None:
    """Name of the first layer type a tree cannot be taken back from, or None."""
    return next((type(layer).__name__ for layer in cache.layers if type(layer) not in SUPPORTED_LAYERS), None)


def _adopt(layer: Any, slots: Slots) -> SlotLayer:
    adopted = SlotLayer(slots, getattr(layer, "sliding_window", None))
    adopted.lazy_initialization(layer.keys, layer.values)
    adopted.keys, adopted.values = layer.keys, layer.values
    adopted.dropped = layer.get_seq_length() - layer.keys.shape[2]
    layer.keys = layer.values = None  # one owner: a buffer that is grown can be freed
    return adopted


def restore(layer: SlotLayer, original: Any) -> None:
    """Give a cache's own layer the verified slots of the one that stood in for it."""
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


def _per_head(slots: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Slot indices (B, P) in the shape `gather` and `scatter_` want for a (B, heads, slots, head_dim) buffer."""
    return slots[:, None, :, None].expand(-1, buffer.shape[1], -1, buffer.shape[3])


def _moved(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """`states` (B, heads, K, head_dim) at the start of a new buffer of `capacity` slots."""
    buffer = states.new_zeros(*states.shape[:2], capacity, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer
