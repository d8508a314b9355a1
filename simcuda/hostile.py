"""The simulated GPU as unkind as it can be, all at once: what real cards do, and it leaves out as it
starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from simcuda.counters import set_allocator, set_pinned_limit, set_workspaces
from simcuda.faults import fail

LARGEST_SHAPE = 4096  # rows that cuBLAS has an int8 kernel for


@contextmanager
def hostile(allocator: str = "native") -> Iterator[None]:
    """Inside, the allocator rounds, and keeps segments (see ``set_allocator``); cuBLAS takes memory,
    and lacks larger shapes of int8; little memory can be page-locked, and a refusal leaves its error
    behind."""
    import torch

    set_allocator(allocator)
    set_workspaces("8MiB")
    set_pinned_limit("64MiB")
    try:
        with fail("op:_int_mm", min_rows=LARGEST_SHAPE + 1, times=10_000):
            yield
    finally:
        set_pinned_limit(None)
        set_workspaces(0)
        torch.cuda.empty_cache()
        set_allocator("exact")
