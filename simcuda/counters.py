"""What the simulated machine counted: memory, copies over the link, pinned memory."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simcuda.library import sim

if TYPE_CHECKING:
    import torch

ALLOCATORS = ("exact", "native", "expandable", "async")  # AllocatorKind of csrc/sim.h
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DECIMAL = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


@dataclass(frozen=True)
class Counters:
    """One device. Copies are those over the link only; a copy between two devices counts on both."""

    allocated: int
    """Bytes of tensors now, whatever the allocator rounds them to; without cuBLAS's workspaces."""
    peak: int
    """Bytes at most since the last reset."""
    allocations: int
    """Allocations since the last reset."""
    h2d_copies: int
    h2d_bytes: int
    d2h_copies: int
    d2h_bytes: int
    d2d_copies: int
    d2d_bytes: int


@dataclass(frozen=True)
class AllocatorCounters:
    """What the allocator of one device does between tensors and the driver (``set_allocator``)."""

    allocated: int
    """Bytes in use now, rounded as the allocator rounds: ``torch.cuda.memory_allocated``."""
    reserved: int
    """Bytes it has from the driver now: ``torch.cuda.memory_reserved``."""
    reserved_peak: int
    """The most of them since the last reset."""
    segments: int
    """How many segments they are in."""
    retries: int
    """Times since the last reset that it emptied its cache for lack of memory."""
    emptied: int
    """Times since the last reset that its cache was emptied, and there was one."""
    segments_freed: int
    """Segments, or pages of expandable ones, given back since the last reset."""


@dataclass(frozen=True)
class HostCounters:
    """Page-locked host memory: PyTorch's pinned tensors (rounded up to a power of two, as there)
    and registrations."""

    pinned: int
    """Bytes locked now, both kinds."""
    pinned_peak: int
    """Bytes locked at most since the last reset."""
    pins: int
    """Times that memory was locked since the last reset."""
    registered: int
    """Of ``pinned``: by cudaHostRegister."""
    unpins: int
    """Times that memory was unregistered since the last reset."""

    @property
    def allocated(self) -> int:
        """Of ``pinned``: by PyTorch's pinned allocator."""
        return self.pinned - self.registered


def parse_size(size: int | str) -> int:
    """Bytes of "4GiB", "512 MiB", "2G" (= GiB), "1.5GB" (decimal) or a plain number."""
    if isinstance(size, int):
        value = size
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", size.lower())
        unit = None
        if match:
            name = match[2]
            unit = _DECIMAL.get(
                name, _UNITS.get(name.removesuffix("ib") if name.endswith("ib") else name)
            )
        if not match or unit is None:
            raise ValueError(f"not a size: {size!r} (examples: 4GiB, 512MiB, 1000000)")
        value = int(float(match[1]) * unit)
    if value < 0:
        raise ValueError(f"a size cannot be negative: {size!r}")
    return value


def _index(device: int | str | torch.device) -> int:
    """The device's index; a bare "cuda" is device 0, so that counts don't depend on what is
    current."""
    import torch

    index = device if isinstance(device, int) else (torch.device(device).index or 0)
    if not 0 <= index < torch.cuda.device_count():
        raise ValueError(f"no simulated device {device}: there are {torch.cuda.device_count()}")
    return index


def counters(device: int | str | torch.device = 0) -> Counters:
    """What one device counted since the last ``reset_counters()``."""
    values = (ctypes.c_uint64 * 9)()
    sim().sim_counters(_index(device), values)
    return Counters(*values)


def allocator_counters(device: int | str | torch.device = 0) -> AllocatorCounters:
    """What one device's allocator counted since the last ``reset_counters()``."""
    values = (ctypes.c_uint64 * 7)()
    sim().sim_allocator_counters(_index(device), values)
    return AllocatorCounters(*values)


def set_allocator(kind: str) -> str:
    """What stands between tensors and the driver from now on, on every device.

    "exact" (as it starts): nothing. Reserved equals allocated, to the byte.
    "native": PyTorch's caching allocator: sizes rounded to 512 bytes, segments of 2 MiB, 20 MiB or
        their own that belong to one stream, and are the driver's again when all of one is free.
    "expandable": the same with ``expandable_segments:True``: pages instead of segments.
    "async": ``cudaMallocAsync``: the driver's pool. An error that a failed call left behind in the
        thread ends the process at the next free, as there.

    Returns:
        The kind until now.
    """
    if kind not in ALLOCATORS:
        raise ValueError(f"no allocator {kind!r}: use one of {', '.join(ALLOCATORS)}")
    return ALLOCATORS[sim().sim_set_allocator(ALLOCATORS.index(kind))]


@contextmanager
def lost_context(device: int | str | torch.device = 0) -> Iterator[None]:
    """Inside, every call that uses the device fails, as after a kernel's illegal access; what was
    queued there never runs. (A real one does not come back.)"""
    before = sim().sim_set_lost(_index(device), 1)
    try:
        yield
    finally:
        sim().sim_set_lost(_index(device), before)


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, this thread captures a graph: nothing that waits is allowed, nor locking memory. (What
    is queued runs all the same, and there is no graph.)"""
    before = sim().sim_set_capturing(1)
    try:
        yield
    finally:
        sim().sim_set_capturing(before)


integrated: set[int] = set()


def set_integrated(device: int | str | torch.device, is_integrated: bool = True) -> None:
    """Whether a device's memory is the machine's own RAM. It is only said, and changes nothing."""
    (integrated.add if is_integrated else integrated.discard)(_index(device))


def host_counters() -> HostCounters:
    """What was counted of page-locked host memory."""
    values = (ctypes.c_uint64 * 5)()
    sim().sim_host_counters(values)
    return HostCounters(*values)


def reset_counters() -> None:
    """Peaks to what is allocated now; copies, bytes, allocations and pins to zero, on every device."""
    sim().sim_reset_counters()


def set_memory(size: int | str, device: int | str | torch.device = 0) -> None:
    """Gives a device another capacity. What is allocated stays, even beyond it."""
    sim().sim_set_capacity(_index(device), parse_size(size))


def contexts() -> list[int]:
    """The devices that this process has used, and so has a driver's context on."""
    import torch

    return [i for i in range(torch.cuda.device_count()) if sim().sim_has_context(i)]


def reset_contexts(size: int | str = 0) -> None:
    """Forgets all contexts, as in a new process. From now on each one takes `size` of its device
    (real ones: 300 to 850 MB)."""
    sim().sim_reset_contexts(parse_size(size))


def set_workspaces(size: int | str) -> None:
    """What cuBLAS takes of a device for each thread and stream that multiplies there, from its first
    product on until ``torch._C._cuda_clearCublasWorkspaces()`` (real ones: 8 to 32 MiB; 0, as it
    starts: nothing). Clears those there are."""
    sim().sim_set_workspaces(parse_size(size))


def set_pinned_limit(size: int | str | None) -> None:
    """How much host memory may be page-locked at once; None for no limit (as it starts)."""
    sim().sim_set_pinned_limit((1 << 64) - 1 if size is None else parse_size(size))


@contextmanager
def strict_host_frees() -> Iterator[None]:
    """Inside, freeing a pinned tensor under a queued copy is an error when the copy runs.

    PyTorch's own allocator keeps such memory until the copy is done, and so does the simulator by
    default; memory locked with cudaHostRegister has no such protection and is always checked.
    """
    before = sim().sim_set_strict_host_frees(1)
    try:
        yield
    finally:
        sim().sim_set_strict_host_frees(before)


def last_error() -> int:
    """The CUDA error number that a failed call of this thread left for the next operator to raise;
    0 for none."""
    return int(sim().sim_peek_last_error())


def queued(stream: torch.Stream) -> int:
    """How many jobs (late copies, waits, marks) a stream still has to run."""
    return int(sim().sim_queued(stream.device_index, stream.stream_id))
