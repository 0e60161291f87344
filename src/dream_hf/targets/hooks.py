"""Hooks on modules for the forwards of one thread: all threads that generate with a model share its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_own: ContextVar[frozenset[_OwnHook]] = ContextVar("dream_hf_hooks", default=frozenset())


@contextmanager
def before_own_forwards(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(module, args, kwargs)` before this thread's forwards of `modules` in the block."""
    with _calling(hook) as own, ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(own, with_kwargs=True).remove)
        yield


@contextmanager
def after_own_forwards(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """Call `hook(module, args, kwargs, output)` after this thread's forwards of `modules` in the block."""
    with _calling(hook) as own, ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(own, with_kwargs=True).remove)
        yield


@contextmanager
def _calling(hook: Callable[..., Any]) -> Iterator[_OwnHook]:
    own = _OwnHook(hook)
    token = _own.set(_own.get() | {own})
    try:
        yield own
    finally:
        _own.reset(token)


class _OwnHook:
    """A hook that does nothing in other threads.

    Those may give it fewer arguments: torch puts a hook in place first, and notes that it takes `kwargs` afterwards.
    """

    def __init__(self, hook: Callable[..., Any]):
        self.hook = hook

    def __call__(self, *given: Any) -> Any:
        return self.hook(*given) if self in _own.get() else None
