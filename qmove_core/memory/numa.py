"""Which processors are near a GPU, on machines with several memory nodes.

Linux makes a page on the node of the thread that touches it first. Copies from the node of another
GPU go over the link between processors, at a fraction of the speed. So pages are made by
threads near the GPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import devices

log = logging.getLogger("qmove")

PCI = Path("/sys/bus/pci/devices")


def near_devices_in_use() -> frozenset[int] | None:
    """The processors near the GPUs that this process uses; None where all are, where these are at
    several nodes, and where nobody can tell (below torch 2.8, other systems than Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    found = {
        _near(str(PCI), _address(index))
        for index in range(torch.cuda.device_count())
        if devices.has_context(torch.device("cuda", index))
    }
    (near,) = found if len(found) == 1 else (None,)
    if near is None:
        return None
    allowed = os.sched_getaffinity(0)
    usable = near & allowed
    return usable if usable and usable != allowed else None


@functools.cache
def _address(index: int) -> str | None:
    """Where a GPU is on the PCI bus, as the system names it."""
    properties = torch.cuda.get_device_properties(index)
    parts = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    numbers = [part for part in parts if part is not None]
    return "{:04x}:{:02x}:{:02x}.0".format(*numbers) if len(numbers) == 3 else None


@functools.cache
def _near(folder: str, address: str | None) -> frozenset[int] | None:
    """The processors that the system says are near a device; None where it does not."""
    if address is None:
        return None
    try:
        text = (Path(folder) / address / "local_cpulist").read_text().strip()
        ranges = [part.partition("-") for part in text.split(",") if part]
        return frozenset(
            cpu for first, _, last in ranges for cpu in range(int(first), int(last or first) + 1)
        )
    except (OSError, ValueError) as error:
        log.debug("the system does not say which processors are near %s: %s", address, str(error))
        return None


@contextlib.contextmanager
def running_on(processors: frozenset[int] | None) -> Iterator[None]:
    """Inside, this thread runs on these processors; on any with None, or where that is refused."""
    if processors is None:
        yield
        return
    try:
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, processors)
    except OSError as error:  # a container may not allow it
        log.debug("a thread could not be bound to processors: %s", str(error))
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)
