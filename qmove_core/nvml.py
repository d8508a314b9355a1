"""What NVIDIA's management library says of a card, also of other processes' memory.

Asking it makes no context on the card, as a first call of CUDA does (300 to 850 MB of VRAM). It is
optional: `pip install nvidia-ml-py`.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import Any, NamedTuple

import psutil
import torch

log = logging.getLogger("qmove")


class Memory(NamedTuple):
    """Bytes of a card: all of it, and what no process uses."""

    free: int
    total: int


class Process(NamedTuple):
    """A process that uses a card. `nbytes` is None where the driver does not tell (WDDM, WSL)."""

    pid: int
    nbytes: int | None


def is_installed() -> bool:
    """Whether the Python package is there; the card and its driver may still not be NVIDIA's."""
    return importlib.util.find_spec("pynvml") is not None


def memory(device: torch.device) -> Memory | None:
    """The card's memory; None where NVML cannot tell."""
    found = _ask("nvmlDeviceGetMemoryInfo", device)
    return None if found is None else Memory(int(found.free), int(found.total))


def processes(device: torch.device) -> list[Process] | None:
    """The processes that compute on the card, this one among them; None where NVML cannot tell.

    In a container only those of the container may be listed.
    """
    found = _ask("nvmlDeviceGetComputeRunningProcesses", device)
    if found is None:
        return None
    return [Process(int(process.pid), process.usedGpuMemory) for process in found]


class OtherProcess(NamedTuple):
    """Another program on a card, with a title for people."""

    title: str
    nbytes: int


def other_processes(device: torch.device) -> list[OtherProcess]:
    """The other programs on a card whose bytes the driver tells; none where NVML cannot tell."""
    found = []
    for process in processes(device) or ():
        if process.pid != os.getpid() and process.nbytes:
            found.append(OtherProcess(_title(process.pid), int(process.nbytes)))
    return found


def _title(pid: int) -> str:
    try:
        return f"{psutil.Process(pid).name()} (process {pid})"
    except psutil.Error:  # it has ended, or belongs to somebody else
        return f"process {pid}"


def _ask(function: str, device: torch.device) -> Any:
    pynvml = library() if device.type == "cuda" else None
    if pynvml is None:
        return None
    try:
        return getattr(pynvml, function)(_handle(pynvml, device.index or 0))
    except pynvml.NVMLError as error:
        log.debug("NVML: %s", str(error))
        return None


@functools.cache
def library() -> Any:
    """`pynvml`, ready to be asked; None without it, without a driver, or on ROCm."""
    if torch.version.hip is not None or not is_installed():
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        log.debug("NVML cannot be used: %s", str(error))
        return None
    return pynvml


def _handle(pynvml: Any, index: int) -> Any:
    """NVML numbers all cards, PyTorch the visible ones. The UUID names the same card in both."""
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
