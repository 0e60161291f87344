"""How many CPU threads a stretch of work runs on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads in the block, in this thread; None changes nothing.

    Switching costs less than a microsecond. Where a forward is many small operations, one thread is faster than several
    that wait for each other in each of them.
    """
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
