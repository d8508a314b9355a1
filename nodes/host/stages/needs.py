"""How much VRAM a node takes beyond what was there before, learned from its last run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from qmove_core import for_hosts

from .. import meter

# Allocators fragment, and batches differ a little. ComfyUI adds the same to its own figures.
HEADROOM = 1.1


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
    """Bytes the node will need, with some headroom.

    None if it never ran, or ran with other choices (another model).
    """
    need = _learned.get(key)
    if need is None or need.choices != choices:
        return None
    return {device: int(nbytes * HEADROOM) for device, nbytes in need.nbytes.items()}


def begin(key: tuple[str, str], choices: tuple[Any, ...]) -> Measurement:
    """Starts to measure. Each device has one peak counter, so measurements cannot overlap."""
    measurement = Measurement(key, choices)
    for device in meter.devices():
        module = torch.get_device_module(device)
        if not hasattr(module, "memory_stats_as_nested_dict"):
            continue  # mps: its needs stay unknown
        if not for_hosts.has_context(device):
            continue  # nothing is there, and asking would take some of the card
        module.reset_peak_memory_stats(device)
        reading = meter.read(device)
        if reading is not None:
            measurement.allocated[device] = reading.allocated
            measurement.free[device] = reading.total - reading.used
    return measurement


def peak(measurement: Measurement) -> dict[torch.device, int]:
    """Bytes beyond those of the beginning, at most, by device."""
    peaks = {}
    for device, before in measurement.allocated.items():
        highest = meter.bytes_of(meter.stats_of(device), "allocated", "peak")
        peaks[device] = max(0, highest - before)
    return peaks


def learn(measurement: Measurement) -> None:
    """Takes the measurement of a node that has run to its end."""
    if measurement.allocated:
        _learned[measurement.key] = Need(measurement.choices, peak(measurement))


def forget(key: tuple[str, str]) -> None:
    """What was learned was too little."""
    _learned.pop(key, None)
