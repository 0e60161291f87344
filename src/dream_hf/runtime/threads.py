"""How many CPU threads a stretch of work runs on, in one thread of the process and in no other."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

# `torch.set_num_threads` sets two numbers of the calling thread, OpenMP's and MKL's, which PyTorch's operations go by, and
# one of the process, which a thread takes over at its first operation and keeps. Here the former are set alone, by the very
# functions that PyTorch calls, so that a thread born meanwhile is none the worse.
LIBRARIES = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")


@contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Let PyTorch use `count` CPU threads in the block, in this thread; None changes nothing.

    Switching costs about a microsecond. Where a forward is many small operations, one thread is faster than several that
    wait for each other in each of them. Where PyTorch was built without OpenMP, nothing is changed either.
    """
    before = torch.get_num_threads()
    setters = _setters()
    if count is None or count == before or setters is None:
        yield
        return
    set_openmp, set_mkl = setters
    set_openmp(count)
    mkl_before = set_mkl(count)
    try:
        yield
    finally:
        set_openmp(before)
        set_mkl(mkl_before)


@cache
def _setters() -> tuple[Callable[[int], None], Callable[[int], int]] | None:
    """What sets this thread's number of OpenMP threads, and that of MKL, which is returned as it was (0: OpenMP's)."""
    for file in (Path(torch.__path__[0], "lib", name) for name in LIBRARIES):
        if file.is_file():
            library = ctypes.PyDLL(str(file))  # holds the GIL: the calls are too short to let others in
            set_openmp = getattr(library, "omp_set_num_threads", None)
            set_mkl = getattr(library, "MKL_Set_Num_Threads_Local", lambda count: 0)
            return None if set_openmp is None else (set_openmp, set_mkl)
    return None
