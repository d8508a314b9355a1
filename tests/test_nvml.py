"""What NVML says of a card, and silence where it is missing, refuses, or is not for this card."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qmove_core import nvml

CARD = torch.device("cuda:1")


class NVMLError(Exception):
    pass


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in for pynvml, with a card for each of PyTorch's devices."""
    uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(2)]
    processes = [
        SimpleNamespace(pid=7, usedGpuMemory=5),
        SimpleNamespace(pid=8, usedGpuMemory=None),
    ]
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=uuids.index,
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(free=card + 10, total=100),
        nvmlDeviceGetComputeRunningProcesses=lambda card: processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(nvml, "is_installed", lambda: True)
    nvml.library.cache_clear()
    yield fake
    nvml.library.cache_clear()


def test_memory_of_the_very_card(library: Any) -> None:
    assert nvml.memory(CARD) == nvml.Memory(free=11, total=100)


def test_processes_and_what_each_takes(library: Any) -> None:
    assert nvml.processes(CARD) == [nvml.Process(7, 5), nvml.Process(8, None)]


@pytest.mark.parametrize(
    "name", ["nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetMemoryInfo"]
)
def test_a_library_that_refuses_says_nothing(library: Any, name: str) -> None:
    def refuse(*_args: object) -> None:
        raise NVMLError("Driver Not Loaded")

    setattr(library, name, refuse)
    assert nvml.memory(CARD) is None


def test_without_the_package_nothing_is_said(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "is_installed", lambda: False)
    assert nvml.memory(CARD) is None
    assert nvml.processes(CARD) is None


def test_other_accelerators_are_not_asked(library: Any) -> None:
    assert nvml.memory(torch.device("mps:0")) is None
    assert nvml.processes(torch.device("xpu:0")) is None
