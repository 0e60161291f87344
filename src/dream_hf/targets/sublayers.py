"""A decoder's sublayers, attention and MLP of each layer, and forwards that leave some of them out.

What is left out adds nothing to the stream that runs through the layers, and writes no keys. While a scope is open the
forwards of a decoder's sublayers are wrapped; a wrapper does nothing unless a context variable of the calling thread says so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .tree_masks import layer_index

ATTENTION, MLP = "attention", "mlp"
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn")  # as families call it

_left_out: ContextVar[frozenset[nn.Module]] = ContextVar("dream_hf_left_out", default=frozenset())
_scopes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # open scopes of a sublayer
_shapes: WeakKeyDictionary[nn.Module, Callable[[torch.Tensor], Any]] = WeakKeyDictionary()
_lock = threading.Lock()


def sublayers(decoder: Any) -> dict[str, nn.Module]:
    """The sublayers that can be left out, by names such as `"3.attention"` and `"3.mlp"`.

    An attention whose keys other layers read (Gemma3n, Gemma4) cannot.
    """
    found: dict[str, nn.Module] = {}
    shared = _shared_layers(decoder)
    stacks = [list(stack) for stack in decoder.children() if isinstance(stack, nn.ModuleList)]
    layers: list[Any] = max([[], *stacks], key=len)
    for index, layer in enumerate(layers):
        for name, child in layer.named_children():
            if name in MLP_NAMES:
                found.setdefault(f"{index}.{MLP}", child)
            elif layer_index(child) is not None and index not in shared:
                found.setdefault(f"{index}.{ATTENTION}", child)
    return found


@contextmanager
def leaving_out(modules: frozenset[nn.Module]) -> Iterator[None]:
    """Forwards of this thread in the block leave out these sublayers."""
    with _lock:
        for module in modules:
            _scopes[module] = _scopes.get(module, 0) + 1
            if _scopes[module] == 1:
                module.forward = _Skippable(module)  # type: ignore[method-assign]
    token = _left_out.set(modules)
    try:
        yield
    finally:
        _left_out.reset(token)
        with _lock:
            for module in modules:
                _scopes[module] -= 1
                skippable: Any = module.forward
                if not _scopes[module]:
                    skippable.restore()


class _Skippable:
    """A module's forward, which gives zeros of the same form where the module is left out."""

    def __init__(self, module: nn.Module):
        self.module, self.own = module, vars(module).get("forward")
        self.run: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.module not in _left_out.get():
            return self.run(*args, **kwargs)
        if self.module not in _shapes:  # what it returns is seen once; what it writes will be overwritten
            outputs = self.run(*args, **kwargs)
            _shapes[self.module] = _zeros_like(outputs)
        hidden = args[0] if args else kwargs["hidden_states"]
        return _shapes[self.module](hidden)

    def restore(self) -> None:
        """Give the module its own forward back."""
        if self.own is None:
            del self.module.forward
        else:
            self.module.forward = self.own  # type: ignore[method-assign]


def _zeros_like(outputs: Any) -> Callable[[torch.Tensor], Any]:
    """What makes zeros, from what enters, in the form of `outputs`: a tensor, or a tuple that begins with one."""
    num_others = len(outputs) - 1 if isinstance(outputs, tuple) else None
    first = outputs if num_others is None else outputs[0]
    is_flat = first.ndim == 2

    def make(hidden: torch.Tensor) -> Any:
        zeros = torch.zeros_like(hidden.flatten(0, -2) if is_flat else hidden)
        return zeros if num_others is None else (zeros, *[None] * num_others)

    return make


def _shared_layers(decoder: Any) -> set[int]:
    """Layers whose keys and values others read."""
    config: Mapping[str, Any] = vars(decoder.config)
    first_reader = config.get("num_hidden_layers", 0) - (config.get("num_kv_shared_layers") or 0)
    if first_reader == config.get("num_hidden_layers", 0):
        return set()
    types = config.get("layer_types") or ["full_attention"] * first_reader
    return {max(i for i in range(first_reader) if types[i] == kind) for kind in set(types[:first_reader])}
