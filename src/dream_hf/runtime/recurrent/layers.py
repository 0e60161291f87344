"""Stand-ins for cache layers with state while trees are verified.

A stand-in holds the state behind the verified text and shows nothing of it to the model: for that the text begins with the
tree, so that it takes the same way through a layer for any number of nodes. That way leads through `update_conv_state`, a
convolution and, where there is a recurrence, through that; [`current_layer`] tells the latter two whose they are. What a node
does to the state is noted, and when a path is kept the state moves on by what its nodes have noted: nothing is run again, and
what is not kept was never in the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from ..counts import Counts
from ..phases import CACHE_WORK, phase
from .paths import NodePaths


class Record(Protocol):
    """What the nodes of a tree do to a state."""

    def after(self, state: torch.Tensor, path: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """The state behind the first `counts` (B,) nodes of `path` (B, P), from the one before the tree."""


_current: ContextVar[StateLayer | None] = ContextVar("dream_hf_state_layer", default=None)


def current_layer() -> StateLayer | None:
    """The layer whose nodes are being run in this thread, from its convolution's inputs to the end of its recurrence."""
    return _current.get()


class StateLayer(LinearAttentionLayer):
    """Stands in for a layer with state.

    Args:
        original (`LinearAttentionCacheLayerMixin`): The layer. Its tensors are written in place.
        states (`TreeStates`): Which tree it is.
    """

    def __init__(self, original: Any, states: TreeStates):
        super().__init__()
        self.states = states
        original.conv_states[0] = self.inputs = _writable(original.conv_states[0], original.conv_kernel_size[0])
        self.state: torch.Tensor | None = original.recurrent_states[0]
        if self.state is not None:
            original.recurrent_states[0] = self.state = _writable(self.state)
        self.forget()

    def forget(self) -> None:
        """Forget what the nodes of the last tree did."""
        self.new_inputs: torch.Tensor | None = None
        self.records: list[tuple[torch.Tensor, Record]] = []  # and which part of the state they are of, as a view

    @property
    def paths(self) -> NodePaths:
        """The tree, where the layer is."""
        return self.states.paths.on(self.inputs.device)

    @property
    def is_complete(self) -> bool:
        """Whether it is known what the nodes do to all of the state."""
        noted = sum(part.numel() for part, _ in self.records)
        return self.new_inputs is not None and (self.state is None or noted == self.state.numel())

    def update_conv_state(self, conv_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """From the nodes' inputs (B, C, N) to the convolution what each node sees, side by side: (B, C, N * kernel size)."""
        _current.set(self)
        self.new_inputs = conv_states
        kernel_size = self.inputs.shape[2]
        places = self.paths.windows(kernel_size).flatten(1)
        inputs = torch.cat([self.inputs, conv_states.to(self.inputs.dtype)], dim=2)
        if len(places) == 1:
            return inputs.index_select(2, places[0])
        return inputs.gather(2, places[:, None].expand(-1, inputs.shape[1], -1))

    def after_convolution(self) -> None:
        """The nodes' inputs have been convolved; where there is no recurrence, that was all."""
        if self.state is None:
            _current.set(None)

    def note(self, part: torch.Tensor, record: Record) -> None:
        """Note what the nodes do to a `part` of the state, which is a view of it."""
        self.records.append((part, record))

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The recurrence is over. A tree leaves no state behind."""
        _current.set(None)
        return recurrent_states

    def keep(self, path: torch.Tensor, counts: torch.Tensor) -> None:
        """Move the state on by the first `counts` (B,) nodes of `path` (B, P)."""
        assert self.new_inputs is not None  # a tree has been verified
        for part, record in self.records:
            part.copy_(record.after(part, path, counts))
        kernel_size = self.inputs.shape[2]
        kept = self.new_inputs.gather(2, path[:, None].expand(-1, self.inputs.shape[1], -1)).to(self.inputs.dtype)
        places = counts[:, None] + torch.arange(kernel_size, device=counts.device)
        inputs = torch.cat([self.inputs, kept], dim=2)
        self.inputs.copy_(inputs.gather(2, places[:, None].expand_as(self.inputs)))
        self.forget()


class StateAndSlotLayer(StateLayer, CacheLayerMixin):  # type: ignore[misc, override]
    """Stands in for a layer with state that attends as well; what is attended to is in another stand-in.

    Args:
        original, states: As for [`StateLayer`].
        attended (`SlotLayer`): Holds the keys and values.
    """

    is_compileable = False  # type: ignore[assignment]

    def __init__(self, original: Any, states: TreeStates, attended: Any):
        StateLayer.__init__(self, original, states)
        self.attended = attended
        self.is_sliding, self.is_initialized = attended.is_sliding, True

    @property
    def keys(self) -> torch.Tensor:  # type: ignore[override]
        return self.attended.keys

    @property
    def values(self) -> torch.Tensor:  # type: ignore[override]
        return self.attended.values

    def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attended.update(*args, **kwargs)

    def get_seq_length(self) -> int:
        return self.attended.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.attended.get_mask_sizes(query_length)


class TreeStates:
    """The layers of a cache that have state, and the tree that they are verifying."""

    layers: Sequence[StateLayer] = ()
    paths: NodePaths

    def begin(self, paths: NodePaths) -> None:
        """Verify another tree."""
        self.paths = paths
        for layer in self.layers:
            layer.forget()

    @property
    def missing(self) -> int:
        """Layers of which it is not known what the tree's nodes do to their state."""
        return sum(not layer.is_complete for layer in self.layers)

    def keep(self, path: torch.Tensor | None, counts: Counts) -> None:
        """Let the states move on by the first `counts` (B,) nodes of `path` (B, P) of the tree; or of a chain."""
        if path is None:
            path = torch.arange(max(counts), device=self.layers[0].inputs.device).expand(len(counts), -1)
        with phase(CACHE_WORK):
            for layer in self.layers:
                device = layer.inputs.device
                layer.keep(path.to(device), counts.on(device))


@contextmanager
def state_layers(cache: Cache, originals: Sequence[Any], states: TreeStates) -> Iterator[None]:
    """Let `cache` keep its states in [`StateLayer`]s while in the block; on the way out it gets what was there before back.

    Args:
        cache (`Cache`): Its layers that attend are stood in for already.
        originals (`Sequence`): Its own layers.
        states (`TreeStates`): Gets the layers.
    """
    before = list(cache.layers)
    stand_ins = {index: _stand_in(before[index], layer, states) for index, layer in stateful(originals).items()}
    for index, layer in stand_ins.items():
        cache.layers[index] = layer  # type: ignore[call-overload]
    states.layers = list(stand_ins.values())
    try:
        yield
    finally:
        _current.set(None)
        cache.layers[:] = before


def stateful(layers: Sequence[Any]) -> dict[int, Any]:
    """Those of a cache's layers that hold a state, by their place."""
    return {
        index: layer
        for index, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin) and layer.conv_states[0] is not None
    }


def _stand_in(present: Any, original: Any, states: TreeStates) -> StateLayer:
    if present is original:
        return StateLayer(original, states)
    return StateAndSlotLayer(original, states, present)


def _writable(state: torch.Tensor, num_last: int | None = None) -> torch.Tensor:
    """The last `num_last` entries of a state, or all; a copy only where there are more, or it could not be written."""
    if num_last is not None and state.shape[-1] > num_last:  # a past is recorded
        return state[..., -num_last:].clone()
    return state.clone() if state.is_inference() and not torch.is_inference_mode_enabled() else state
