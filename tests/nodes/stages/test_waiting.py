"""Restore Model and Free VRAM wait until another program has freed VRAM, as NVML tells it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qmove_pack.nodes import NODE_CLASS_MAPPINGS
from qmove_pack.nodes.host import browser
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.stages import job_queue, waiting

import qmove_core as qmove
import simcuda
from qmove_core import nvml
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_of, node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated

SIZE = 256  # MiB of the card
GIB = 1024  # MiB


class NVMLError(Exception):
    pass


class OtherProgram:
    """Another program on the first card, in the eyes of NVML and of the driver.

    Attributes:
        holds: MiB. `frees` has what it will hold after each further look of NVML.
    """

    def __init__(self) -> None:
        self.frees: list[int] = []
        self.looks = 0
        self.on_look: Any = lambda: None
        self.hold(0)

    def hold(self, mib: int) -> None:
        self.holds = mib
        simcuda.set_memory((SIZE - mib) * MIB)

    def memory(self, card: int) -> Any:
        self.looks += 1
        self.on_look()
        if self.frees:
            self.hold(self.frees.pop(0))
        free = torch.cuda.mem_get_info(0)[0]
        return SimpleNamespace(free=free, total=SIZE * MIB)

    def processes(self, card: int) -> list[Any]:
        return [SimpleNamespace(pid=os.getppid(), usedGpuMemory=self.holds * MIB)]


@pytest.fixture
def other(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtherProgram]:
    other = OtherProgram()
    uuids = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(2)]
    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=uuids.index,
        nvmlDeviceGetMemoryInfo=other.memory,
        nvmlDeviceGetComputeRunningProcesses=other.processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(nvml, "is_installed", lambda: True)
    monkeypatch.setattr(waiting, "SECONDS_BETWEEN_LOOKS", 0)
    nvml.library.cache_clear()
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL, *NODE_CLASS_MAPPINGS.values())
    yield other
    nvml.library.cache_clear()


@pytest.fixture
def without_nvml(other: OtherProgram, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "is_installed", lambda: False)
    nvml.library.cache_clear()


def free(mib: int, *, wait: bool = True) -> str:
    return NODE_CLASS_MAPPINGS["QMoveFreeVRAM"]().free(mib / GIB, wait)["result"][1]  # type: ignore[attr-defined]


def waits(host: FakeHost) -> list[dict[str, Any]]:
    moves = [data for event, data in host.server.sent if event == browser.MOVE]
    return [move for move in moves if move["verb"] == "wait"]


def test_free_vram_waits_until_the_other_program_has_freed_the_rest(
    host: FakeHost, other: OtherProgram
) -> None:
    other.hold(200)
    other.frees = [200, 200, 150, 100]

    with host.node_runs("7"):
        report = free(140)

    assert other.frees == []
    assert torch.cuda.mem_get_info(0)[0] == 156 * MIB
    assert "until other programs had freed VRAM of cuda:0." in report
    assert "cuda:0: 156.00 MiB are free" in report


def test_it_parks_its_own_models_before_it_waits(host: FakeHost, other: OtherProgram) -> None:
    residency.take_in([model := model_of(64)])
    other.hold(150)
    other.on_look = lambda: parked.append(qmove.is_parked(model))
    parked: list[bool] = []
    other.frees = [150, 0]

    free(200)

    assert parked and all(parked)


def test_it_does_not_wait_where_parking_is_enough_or_nobody_asked(
    host: FakeHost, other: OtherProgram
) -> None:
    residency.take_in([_model := model_of(64)])
    free(250)
    assert other.looks == 0
    other.hold(200)
    report = free(140, wait=False)
    assert other.looks == 0
    assert "less than the" in report


def test_progress_shows_on_the_node_in_the_bar_and_in_the_panel(
    host: FakeHost, other: OtherProgram
) -> None:
    other.hold(200)
    other.frees = [200, 180, 100]
    with host.node_runs("7"):
        free(140)

    first, *_, last = waits(host)
    assert (first["name"], first["model"], first["node"]) == ("cuda:0", 0, "7")
    assert (first["state"], first["cancel"], first["total"]) == ("running", "prompt", 140 * MIB)
    assert (last["state"], last["done"]) == ("done", 140 * MIB)
    assert {move["bytes_per_second"] for move in waits(host)} == {None}
    texts = [text for node_id, text in host.server.texts if node_id == "7"]
    begin = "Waiting for other programs to free VRAM of cuda:0: 56.00 MiB of 140.00 MiB"
    assert begin in texts
    assert ("7", 56 * MIB, 140 * MIB) in host.bars


def test_an_interrupt_ends_the_wait(host: FakeHost, other: OtherProgram) -> None:
    other.hold(200)

    def interrupt() -> None:
        if other.looks == 5:
            host.management.interrupt_current_processing(True)

    other.on_look = interrupt
    host.run({"free": node("QMoveFreeVRAM", gib=140 / GIB, wait=True)})

    assert [type(error) for error in host.errors] == [host.management.InterruptProcessingException]
    assert other.looks == 5
    assert waits(host)[-1]["state"] == "cancelled"
    assert job_queue.run_or_queue(lambda: "at once") == (True, "at once")


def test_what_this_process_holds_itself_is_not_waited_for(
    host: FakeHost, other: OtherProgram
) -> None:
    mine = torch.empty(128 * MIB, dtype=torch.uint8, device="cuda:0")

    report = free(200)

    assert waits(host) == []
    assert "Did not wait for 200.00 MiB on cuda:0" in report
    assert "128.00 MiB of them itself" in report
    del mine


def test_requests_of_others_need_not_wait_for_a_node_that_waits(
    host: FakeHost, other: OtherProgram, gpu: GPU
) -> None:
    """Else an LLM server that asks for VRAM first, to free it later, would wait for ever."""
    other.hold(200)
    answered: list[bool] = []

    def ask() -> None:
        if not answered:
            answered.append(job_queue.run_when_free(lambda: True).done())
            other.frees = [0]

    other.on_look = lambda: other.looks > 3 and ask()
    host.run({"free": node("QMoveFreeVRAM", gib=140 / GIB, wait=True)})

    assert host.errors == []
    assert answered == [True]


def test_the_node_counts_as_running_again_after_its_wait(
    host: FakeHost, other: OtherProgram
) -> None:
    other.hold(200)
    other.frees = [200, 200, 0]
    job_queue.node_begins()
    free(140)
    assert job_queue.run_or_queue(lambda: "now") == (False, None)
    job_queue.node_ended()


def test_restore_waits_for_room_and_then_brings_the_model_home(
    host: FakeHost, other: OtherProgram
) -> None:
    residency.park(residency.take_in([model := model_of(64)]))
    other.hold(250)
    other.frees = [250, 220, 60]
    restore = NODE_CLASS_MAPPINGS["QMoveRestore"]()

    _model, report = restore.restore(model, "home", 150 / GIB)["result"]  # type: ignore[attr-defined]

    assert other.frees == []
    assert not qmove.is_parked(model)
    assert "until other programs had freed VRAM of cuda:0." in report
    assert "Restored Sequential" in report


def test_restore_of_what_is_home_waits_for_nothing(host: FakeHost, other: OtherProgram) -> None:
    residency.take_in([model := model_of(16)])
    other.hold(200)
    NODE_CLASS_MAPPINGS["QMoveRestore"]().restore(model, "home", 150 / GIB)  # type: ignore[attr-defined]
    assert other.looks == 0


def test_without_nvml_the_driver_is_asked_and_the_report_says_what_is_missing(
    host: FakeHost, other: OtherProgram, without_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        waiting.for_hosts,
        "memory_without_context",
        lambda device: nvml.Memory(torch.cuda.mem_get_info(0)[0], SIZE * MIB),
    )
    other.hold(200)
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: other.hold(100))

    report = free(140)

    assert "pip install nvidia-ml-py" in report
    assert torch.cuda.mem_get_info(0)[0] >= 140 * MIB


def test_where_nobody_can_tell_what_is_free_it_is_an_error_that_says_what_to_install(
    host: FakeHost, other: OtherProgram, without_nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.hold(200)
    monkeypatch.setattr(waiting.for_hosts, "memory_without_context", lambda device: None)

    with pytest.raises(qmove.MissingDependency, match="pip install nvidia-ml-py"):
        free(140)


def test_the_log_names_who_holds_the_card(
    host: FakeHost, other: OtherProgram, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="qmove")
    other.hold(200)
    other.frees = [200, 200, 0]
    free(140)
    assert f"(process {os.getppid()}) holds 200.00 MiB" in caplog.text
