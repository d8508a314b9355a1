"""Anonymous memory maps, and their pages made before somebody waits for them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import numpy

PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14 on, which Python's mmap does not name yet


def map_memory(nbytes: int) -> mmap.mmap:
    """`nbytes` of zeros (whole pages of them), of which no page exists before it is touched.

    Raises:
        MemoryError, OSError: the system refused.
    """
    if sys.platform == "win32":
        return mmap.mmap(-1, max(nbytes, 1))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # type: ignore[attr-defined,unused-ignore]
    memory = mmap.mmap(-1, max(nbytes, 1), flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # Pages of 2 MiB are made several times as fast, and there are fewer to lock. Some kernels
        # are built without.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def round_to_pages(nbytes: int) -> int:
    """The bytes that a map of `nbytes` really takes."""
    return -(-max(nbytes, 1) // PAGE) * PAGE


def touch(memory: numpy.ndarray) -> None:
    """Makes the pages of a page-aligned stretch of a map, without holding the GIL and without
    changing what is in them.

    It never writes: somebody else may be writing there now. Where the system cannot populate pages
    they are read instead, which makes them on Windows; on a Linux before 5.14 it does not, and
    locking them takes longer.
    """
    if not advise(memory.ctypes.data, memory.nbytes, _POPULATE_WRITE):
        memory[::PAGE].max(initial=0)


def advise(address: int, nbytes: int, advice: int) -> bool:
    """`madvise` for a page-aligned stretch of memory.

    False where the system has none, or refuses.
    """
    madvise = _madvise()
    return madvise is not None and madvise(address, nbytes, advice) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None:
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise
