"""How much VRAM a node takes beyond what was there before, learned from its last run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .. import meter
from ..models import residency

HEADROOM = 1.1  # of what was learned: allocators fragment, and batches differ a little. The host adds the same to its own figures


@dataclass
class Measurement:
    """A node that runs: what was allocated and what was free when it began, in bytes, by device."""

    key: tuple[str, str]
    choices: tuple[Any, ...]
    allocated: dict[torch.device, int] = field(default_factory=dict)
    free: dict[torch.device, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Need:
    """Bytes that the last run took at its peak, by device, and what was chosen on the node then."""

    choices: tuple[Any, ...]
    nbytes: dict[torch.device, int]


_learned: dict[tuple[str, str], Need] = {}


def known(key: tuple[str, str], choices: tuple[Any, ...]) -> dict[torch.device, int] | None:
    """What the node will need, with some headroom; None for one that never ran, or ran with another choice (another model)."""
    need = _learned.get(key)
    if need is None or need.choices != choices:
        return None
    return {device: int(nbytes * HEADROOM) for device, nbytes in need.nbytes.items()}


def begin(key: tuple[str, str], choices: tuple[Any, ...]) -> Measurement:
    """Starts to measure; there is one peak counter for each device, so measurements cannot overlap."""
    measurement = Measurement(key, choices)
    for device in residency.devices():
        module = torch.get_device_module(device)
        if hasattr(
            module, "memory_stats_as_nested_dict"
        ):  # not on mps, whose needs then stay unknown
            module.reset_peak_memory_stats(device)
            stats = meter.stats_of(device)
            measurement.allocated[device] = meter.bytes_of(stats, "allocated", "current")
            unused = meter.bytes_of(stats, "reserved", "current") - measurement.allocated[device]
            measurement.free[device] = module.mem_get_info(device)[0] + unused
    return measurement


def peak(measurement: Measurement) -> dict[torch.device, int]:
    """Bytes beyond those of the beginning, at most, by device."""
    peaks = {
        device: meter.bytes_of(meter.stats_of(device), "allocated", "peak")
        for device in measurement.allocated
    }
    return {
        device: max(0, peaks[device] - before) for device, before in measurement.allocated.items()
    }


def learn(measurement: Measurement) -> None:
    """Takes the measurement of a node that has run to its end."""
    if measurement.allocated:
        _learned[measurement.key] = Need(measurement.choices, peak(measurement))


def forget(key: tuple[str, str]) -> None:
    """What was learned was too little."""
    _learned.pop(key, None)
