"""The accelerators and what is in use on them, read cheaply enough to do it at each stage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from qmove_core import for_hosts

from . import comfy

Stats = dict[torch.device, dict[str, Any]]  # the allocator's counters, as PyTorch nests them

log = logging.getLogger("qmove")

GIB = 2**30
WITHOUT_A_CARD = 8.0  # GiB


class Reading(NamedTuple):
    """Bytes on a device.

    Attributes:
        total: size of the device.
        used: in use by all programs, without what PyTorch's allocator holds unused.
        allocated: the part of `used` that PyTorch's tensors take.
    """

    total: int
    used: int
    allocated: int


@functools.cache  # they do not change, and ComfyUI too asks for them only at its start
def devices() -> list[torch.device]:
    """The accelerators of this machine."""
    known = [torch.device(name) for name in for_hosts.known_devices()]
    return [device for device in known if device.type != "cpu"]


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`, as the host counts them; None if unknown."""
    host = comfy.model_management()
    return for_hosts.free_memory(device) if host is None else int(host.get_free_memory(device))


def read(device: torch.device) -> Reading | None:
    """One reading; None where the backend cannot say (mps), or only by starting to use the card."""
    memory = for_hosts.memory_without_context(device)
    if memory is None:
        return None
    free, total = memory
    if not for_hosts.has_context(device):
        return Reading(total, total - free, 0)
    stats = stats_of(device)
    allocated = bytes_of(stats, "allocated", "current")
    unused = bytes_of(stats, "reserved", "current") - allocated
    return Reading(total, total - free - unused, allocated)


def usual_gib() -> float:
    """GiB of VRAM to have free where nobody says how many: half of the smallest GPU's."""
    totals = [reading.total for device in devices() if (reading := read(device)) is not None]
    if not totals:
        return WITHOUT_A_CARD
    half = min(totals) / GIB / 2
    return float(round(half)) if half >= 2 else max(0.1, round(half, 1))


def least_free(places: Iterable[torch.device] = ()) -> int:
    """Bytes that can be allocated on the fullest of these devices, of all where none are named; 0
    without a device."""
    return min((free_bytes(device) or 0 for device in tuple(places) or devices()), default=0)


def reserved_bytes(device: torch.device) -> int:
    """Bytes of a device that PyTorch's allocator has, for tensors and unused."""
    if not has_counters(device) or not for_hosts.has_context(device):
        return 0
    return bytes_of(stats_of(device), "reserved", "current")


def has_counters(device: torch.device) -> bool:
    """Whether the allocator counts what it gives out there (it does not on mps)."""
    return hasattr(torch.get_device_module(device), "memory_stats_as_nested_dict")


def stats_of(device: torch.device) -> dict[str, Any]:
    """The allocator's counters; empty before the first use of the device, and where the allocator
    has none (pluggable ones)."""
    # `memory_allocated` and the like flatten and sort all counters on each call: ten times slower.
    try:
        return torch.get_device_module(device).memory_stats_as_nested_dict(device.index)
    except RuntimeError as error:
        log.debug("%s does not count what it gives out: %s", device, str(error))
        return {}


def all_stats() -> Stats:
    """The allocator's counters on each device that is in use here: one without a context has none,
    and asking would take some of it."""
    return {
        device: stats_of(device)
        for device in devices()
        if has_counters(device) and for_hosts.has_context(device)
    }


def bytes_of(stats: dict[str, Any], kind: str, which: str) -> int:
    return stats[f"{kind}_bytes"]["all"][which] if stats else 0
