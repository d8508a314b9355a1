"""The driver's own lock, which few calls hold for long and every use of a device needs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from simcuda.faults import new_references
from simcuda.library import DriverFn, sim

CALLS = ("pin", "unpin", "malloc", "free")  # DriverCallKind of csrc/sim.h


@dataclass(frozen=True)
class DriverCall:
    """A call that holds the lock now."""

    kind: str
    """"pin" (cudaHostRegister, cudaHostAlloc), "unpin", "malloc" (what PyTorch's allocator asks the
    driver for) or "free" (its cache is emptied)."""
    nbytes: int
    """For "pin" and "malloc"; 0 for the others."""


@dataclass(frozen=True)
class DriverCounters:
    """Calls of one kind since the last ``reset_counters()``, and virtual seconds."""

    calls: int
    seconds: float
    """For which they held the lock in all."""
    longest: float
    """For which one of them did: so long another thread's launch may have to wait."""


def driver_counters(kind: str) -> DriverCounters:
    """What was counted of calls that hold the driver's lock (``CALLS``)."""
    if kind not in CALLS:
        raise ValueError(f"no call {kind!r} of the driver: use one of {', '.join(CALLS)}")
    values = (ctypes.c_double * 3)()
    sim().sim_driver_counters(CALLS.index(kind), values)
    return DriverCounters(int(values[0]), values[1], values[2])


_callback: Callable[[DriverCall], object] | None = None


def _notify(kind: int, nbytes: int, error: ctypes._Pointer[ctypes.c_void_p]) -> None:
    callback = _callback
    if callback is None:
        return
    try:
        callback(DriverCall(CALLS[kind], nbytes))
    except BaseException as raised:  # not swallowed: C++ raises it at the caller
        error[0], error[1] = new_references(raised, 1)


_trampoline = DriverFn(_notify)


@contextmanager
def on_driver_call(callback: Callable[[DriverCall], object]) -> Iterator[None]:
    """Inside the block, ``callback`` is called by each call that holds the driver's lock, while it
    does; what it raises, the call raises. Until it returns other threads wait that copy, launch,
    allocate, lock memory or ask what is free, as they would on a real machine.

    The innermost block's callback is the one that is called.
    """
    global _callback
    before, _callback = _callback, callback
    sim().sim_on_driver_call(_trampoline)
    try:
        yield
    finally:
        _callback = before
        if before is None:
            sim().sim_on_driver_call(DriverFn())
