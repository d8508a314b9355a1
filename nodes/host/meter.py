"""Reads what is in use on a device, cheaply enough to do it at each stage."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Reading(NamedTuple):
    """Bytes: the size of the device, what is in use on it (by all programs; not what the allocator holds unused), and what of it
    PyTorch's tensors take."""

    total: int
    used: int
    allocated: int


def read(device: torch.device) -> Reading | None:
    """One reading; None where the backend cannot say (mps)."""
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, total = module.mem_get_info(device.index)
    stats = stats_of(device)
    allocated = bytes_of(stats, "allocated", "current")
    unused = bytes_of(stats, "reserved", "current") - allocated
    return Reading(total, total - free - unused, allocated)


def stats_of(device: torch.device) -> dict[str, Any]:
    """The allocator's counters; empty before the first use of the device."""
    # `memory_allocated` and the like flatten and sort all of these figures for each call: ten times as long.
    return torch.get_device_module(device).memory_stats_as_nested_dict(device.index)


def bytes_of(stats: dict[str, Any], kind: str, which: str) -> int:
    return stats[f"{kind}_bytes"]["all"][which] if stats else 0
