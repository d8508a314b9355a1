"""Where a machine has several memory nodes, host memory is made at that of the GPU."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qmove_core import devices
from qmove_core.memory import arena, numa, pages
from tests.builders.arena import MIB, nothing, pinned_storage

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]

ALL = frozenset(range(8))


class Machine:
    """Eight processors in two nodes, as Linux tells of them, and which threads ran where."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bound = folder, dict[int, frozenset[int]]()
        self.near = {0: "0-3", 1: "4,5-7"}
        self.in_use = {0}
        self.refuses = False
        monkeypatch.setattr(numa, "PCI", folder)
        monkeypatch.setattr(devices, "has_context", lambda device: device.index in self.in_use)
        self.of_torch = torch.cuda.get_device_properties
        monkeypatch.setattr(torch.cuda, "get_device_properties", self.properties)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(self.now()), raising=False)
        monkeypatch.setattr(os, "sched_setaffinity", self.bind, raising=False)
        self.knows_the_bus = True
        numa._address.cache_clear()

    def plug_in(self) -> None:
        for index, text in self.near.items():
            place = self.folder / f"0001:{0xA0 + index:02x}:00.0"
            place.mkdir()
            (place / "local_cpulist").write_text(text + "\n")

    def properties(self, index: int) -> object:
        if not self.knows_the_bus:
            return self.of_torch(index)
        bus = {"pci_domain_id": 1, "pci_bus_id": 0xA0 + index, "pci_device_id": 0}
        return SimpleNamespace(**(vars(self.of_torch(index)) | bus))

    def now(self) -> frozenset[int]:
        return self.bound.get(threading.get_ident(), ALL)

    def bind(self, _pid: int, processors: frozenset[int] | set[int]) -> None:
        if self.refuses:
            raise PermissionError("not in this container")
        self.bound[threading.get_ident()] = frozenset(processors)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    yield Machine(tmp_path, monkeypatch)
    numa._address.cache_clear()


def touched_on(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> set[frozenset[int]]:
    """Makes a block, and says on which processors its pages were made."""
    seen, touch = set[frozenset[int]](), pages.touch

    def watched(memory: object) -> None:
        seen.add(machine.now())
        touch(memory)  # type: ignore[arg-type]

    monkeypatch.setattr(pages, "touch", watched)
    storage, _block = pinned_storage(20 * MIB)
    assert storage.nbytes() == 20 * MIB
    assert set(machine.bound.values()) <= {ALL}, "threads run anywhere afterwards"
    return seen


@pytest.mark.parametrize(("gpu_in_use", "near"), [(0, range(4)), (1, range(4, 8))])
def test_pages_are_made_near_the_gpu_in_use(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, gpu_in_use: int, near: range
) -> None:
    machine.plug_in()
    machine.in_use = {gpu_in_use}
    assert touched_on(monkeypatch, machine) == {frozenset(near)}


@pytest.mark.parametrize(
    "case",
    ["GPUs at both nodes", "one node", "an older torch", "no such folder", "nonsense", "refused"],
)
def test_where_that_says_nothing_pages_are_made_anywhere(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    if case == "one node":
        machine.near = {0: "0-7", 1: "0-7"}
    if case == "nonsense":
        machine.near = {0: "all", 1: ""}
    if case != "no such folder":
        machine.plug_in()
    if case == "GPUs at both nodes":
        machine.in_use = {0, 1}
    machine.knows_the_bus = case != "an older torch"
    machine.refuses = case == "refused"
    assert touched_on(monkeypatch, machine) == {ALL}


def test_a_thread_that_may_run_on_some_of_them_only_keeps_to_those(machine: Machine) -> None:
    machine.plug_in()
    machine.bound[threading.get_ident()] = frozenset({2, 3, 4})
    assert numa.near_devices_in_use() == {2, 3}
    machine.bound[threading.get_ident()] = frozenset({6})
    assert numa.near_devices_in_use() is None


def test_a_system_that_binds_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert numa.near_devices_in_use() is None
    (storage,) = arena.allocate([MIB], nothing)
    assert storage.nbytes() == MIB
