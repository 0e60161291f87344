"""Names for stretches of work, so that a clock can be held to them without replacing any function.

Without a clock a phase costs a look at a variable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

PREFILL = "prefill"
STEP = "step"
TARGET = "target forward"
DRAFTER = "drafter forward"
GROWTH = "tree growth"
ACCEPTANCE = "acceptance"
CACHE_WORK = "cache work"
MASK = "mask building"

Clock = Callable[[str], AbstractContextManager[None]]

_clock: ContextVar[Clock | None] = ContextVar("dream_hf_clock", default=None)
_nothing = nullcontext()


def phase(name: str) -> AbstractContextManager[None]:
    """A block that belongs to the phase `name`."""
    clock = _clock.get()
    return _nothing if clock is None else clock(name)


@contextmanager
def clocked_by(clock: Clock) -> Iterator[None]:
    """Let `clock` make the context of every phase of this thread while in the block."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
