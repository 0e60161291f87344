"""Scoped wraps of what transformers looks up: its registries of functions, and the names in its configurations.

transformers builds every mask through a function looked up in an `AttentionMaskInterface`, and runs every attention but
the eager one through one looked up in an `AttentionInterface`. Wrapping the look-up reaches them all, whoever registered
what, where (for all models, or in one registry) and when.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import Any


class ScopedWrap:
    """An attribute of a class or a module, wrapped while at least one scope is open."""

    def __init__(self, owner: type | ModuleType, name: str, wrap: Callable[[Any], Any]):
        self.owner, self.name, self.wrap = owner, name, wrap
        self.lock = threading.Lock()
        self.num_users = 0
        self.own: Any = None  # what the owner itself has, if it does not inherit it
        # What was wrapped last, and the wrap: compiled code knows it again.
        self.wrapped: tuple[Any, Any] = (None, None)

    @contextmanager
    def installed(self) -> Iterator[None]:
        with self.lock:
            self.num_users += 1
            if self.num_users == 1:
                self.own = vars(self.owner).get(self.name)
                found = getattr(self.owner, self.name)
                if self.wrapped[0] is not found:
                    self.wrapped = found, self.wrap(found)
                setattr(self.owner, self.name, self.wrapped[1])
        try:
            yield
        finally:
            with self.lock:
                self.num_users -= 1
                if not self.num_users:
                    if self.own is None:
                        delattr(self.owner, self.name)
                    else:
                        setattr(self.owner, self.name, self.own)


def wrapped_lookup(wrap: Callable[[str, Callable], Callable]) -> Callable[[Callable], Callable]:
    """Let a registry's `__getitem__` return `wrap(name, function)` for what it would return."""

    def wrap_getitem(look_up: Callable) -> Callable:
        return wraps(look_up)(lambda registry, name: wrap(name, look_up(registry, name)))

    return wrap_getitem
