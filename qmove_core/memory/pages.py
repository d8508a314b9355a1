"""Memory maps: their pages made before somebody waits for them, and read without a crash."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import mmap
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy
import torch

from .. import workers
from . import numa

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


def read(address: int, out: numpy.ndarray) -> int:
    """Copies mapped memory to `out`, without holding the GIL; returns the bytes that could be read.

    Where a file behind the map has become shorter, a plain read ends the process (SIGBUS), while
    the kernel reads up to there for us. Where it may not (some containers), and on other systems,
    the caller's own look at the size of the file is all there is.
    """
    call = _process_vm_readv()
    done = 0
    while call is not None and done < out.nbytes:
        here = (ctypes.c_size_t * 2)(out.ctypes.data + done, out.nbytes - done)
        there = (ctypes.c_size_t * 2)(address + done, out.nbytes - done)
        count = call(os.getpid(), here, 1, there, 1, 0)
        if count < 0 and ctypes.get_errno() != errno.EFAULT:
            break  # not allowed
        if count <= 0:
            return done
        done += count
    if done < out.nbytes:
        ctypes.memmove(out.ctypes.data + done, address + done, out.nbytes - done)
    return out.nbytes


@functools.cache
def _process_vm_readv() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if call is not None:
        call.restype = ctypes.c_ssize_t
        ulong = ctypes.c_ulong
        call.argtypes = (ctypes.c_int, ctypes.c_void_p, ulong, ctypes.c_void_p, ulong, ulong)
    return call  # type: ignore[no-any-return]


def is_unwritten(address: int, nbytes: int) -> bool:
    """Whether a stretch of a private map of a file shows the file, in every page that it touches:
    nobody has written to one, which makes a copy of that page.

    False also where the system does not tell.
    """
    first, end = address // PAGE, -(-(address + nbytes) // PAGE)
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(first * 8)
            found = pagemap.read((end - first) * 8)
    except OSError:
        return False
    pages = numpy.frombuffer(found, numpy.uint64)
    is_there, is_of_file = (pages >> _THERE) != 0, (pages >> _OF_FILE) & _BIT != 0
    return len(pages) == end - first and bool((is_of_file | ~is_there).all())


# Of an entry of Linux's pagemap: bit 63 and 62 say that the page is in RAM or swapped out, bit 61
# that it is a file's and not a private copy.
_THERE, _OF_FILE, _BIT = numpy.uint64(62), numpy.uint64(61), numpy.uint64(1)


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies between flat uint8 CPU tensors of one length, by several threads, without the GIL.

    They keep both alive, should an exception end the wait for them.
    """
    to, of = target.numpy(), source.numpy()
    stripes = [slice(at, at + _STRIPE) for at in range(0, len(to), _STRIPE)]
    futures = [workers.submit(numpy.copyto, to[stripe], of[stripe]) for stripe in stripes[1:]]
    for stripe in stripes[:1]:
        numpy.copyto(to[stripe], of[stripe])
    for stripe, future in zip(stripes[1:], futures, strict=True):
        if future is None:  # no more threads can be started
            numpy.copyto(to[stripe], of[stripe])
        else:
            future.result()


def touch_in_background(memory: numpy.ndarray) -> list[Future[float]]:
    """`touch` by several threads, near the GPU, each future with the seconds that its part took.
    The memory is made when all that is returned is done.

    Where no thread starts, locking makes the pages too, only slower.
    """
    stripes = (memory[at : at + _STRIPE] for at in range(0, len(memory), _STRIPE))
    near = numa.near_devices_in_use()
    futures = [workers.submit(_timed_touch, stripe, near) for stripe in stripes]
    return [future for future in futures if future is not None]


def _timed_touch(memory: numpy.ndarray, processors: frozenset[int] | None) -> float:
    with numa.running_on(processors):
        began = clock()
        touch(memory)
        return clock() - began


def is_slow(nbytes: int, seconds: float) -> bool:
    """Whether pages were made so slowly that the system must be moving others about for it, as
    Linux does for huge pages where free memory lies in pieces.

    Args:
        nbytes: how much was made.
        seconds: what it took, of all threads together.
    """
    threads = min(workers.COUNT, -(-nbytes // _STRIPE))
    return seconds > 0 and nbytes * threads / seconds < SLOW


def make_small_from_now(address: int, nbytes: int) -> None:
    """Has the pages of a page-aligned stretch of a map that are not made yet be small ones."""
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        advise(address, nbytes, mmap.MADV_NOHUGEPAGE)


clock = time.perf_counter  # in seconds; a test has its own
SLOW = 1e9  # bytes per second; where memory is whole one thread makes several times as many
_STRIPE = 8 << 20  # bytes that one thread touches or copies at a time
