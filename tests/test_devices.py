"""Devices of this machine, also where PyTorch has no accelerator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import devices, nvml
from qmove_core.cli.doctor import examine
from qmove_core.memory import pinning
from tests.builders.models import layers


def raises() -> torch.device | None:
    raise RuntimeError("Please register an accelerator")


def none() -> torch.device | None:
    return None


@pytest.fixture(params=[raises, none], ids=["torch 2.6", "torch 2.7"])
def no_accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch answers without an accelerator: 2.6 raises, later releases return None."""
    answer: Callable[[], torch.device | None] = request.param
    monkeypatch.setattr(torch.accelerator, "current_accelerator", answer)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)


def test_a_machine_without_an_accelerator_has_a_cpu(no_accelerator: None) -> None:
    assert devices.accelerator() is None
    assert devices.known() == ["cpu"]
    assert devices.resolve("cpu") == torch.device("cpu")
    with pytest.raises(qmove.UnknownDevice, match=r"cuda:0 on this machine\. It has: cpu"):
        devices.resolve("cuda")
    with pytest.raises(qmove.UnknownDevice, match="no accelerator, only the CPU"):
        devices.resolve(0)


def test_without_an_accelerator_a_park_does_nothing_and_the_doctor_says_so(
    no_accelerator: None,
) -> None:
    assert qmove.park(layers(1, device="cpu")).copied_bytes == 0
    assert examine().devices == []
    assert not pinning.is_possible()


@pytest.mark.simulated
class TestNoContextIsMadeOnAnotherGPU:
    """A first call on a GPU takes 300 to 850 MB of it, which nobody asked for."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        simcuda.reset_contexts("300MiB")
        yield
        simcuda.reset_contexts()

    def test_by_moves_from_a_new_thread(self) -> None:
        model = layers(2, device="cuda:1")
        failures: list[BaseException] = []

        def move() -> None:
            try:
                for _ in range(2):
                    qmove.park(model)
                    qmove.restore(model)
                qmove.park(model)
                qmove.prepare(layers(2, device="cuda:1"))
                qmove.stats()
                qmove.trim()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=move)
        thread.start()
        thread.join()
        assert failures == []
        assert simcuda.contexts() == [1]

    def test_by_the_doctor(self) -> None:
        torch.zeros(1, device="cuda:0")
        other = examine().devices[1]
        assert simcuda.contexts() == [0]
        assert (other.total, other.free) == (simcuda.parse_size("4GiB"), None)

    def test_by_asking_nvml(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(nvml, "memory", lambda device: nvml.Memory(5, 7))
        assert devices.memory_without_context(torch.device("cuda:1")) == (5, 7)
        assert simcuda.contexts() == []
        torch.zeros(1, device="cuda:1")
        free = devices.memory_without_context(torch.device("cuda:1"))
        assert free == torch.cuda.mem_get_info(1)


def _does_not_say(*_args: object) -> tuple[int, int]:
    raise RuntimeError("The device does not have the ext_intel_free_memory aspect")


@pytest.mark.parametrize("name", ["mem_get_info", "memory_reserved"])
def test_a_backend_that_cannot_say_what_is_free_lets_the_allocation_decide(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """XPU on several systems; CUDA with a pluggable allocator."""
    model = layers(2)
    before = [p.detach().cpu() for p in model.parameters()]
    monkeypatch.setattr(torch.cuda, name, _does_not_say)
    assert devices.free_memory(torch.device("cuda:0")) is None
    qmove.park(model)
    qmove.restore(model)
    assert all(map(torch.equal, before, [p.cpu() for p in model.parameters()]))


def test_an_accelerator_without_devices_is_a_cpu_only_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)

    assert devices.known() == ["cpu"]
    for device in ("cuda", 0):  # a build for CUDA without a driver, where asking for one raises
        monkeypatch.setattr(torch.accelerator, "current_device_index", raises)
        with pytest.raises(qmove.UnknownDevice):
            devices.resolve(device)


def test_the_host_sleeps_while_copies_are_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other events spin: a core at 100 % for as long as the copies take."""
    made: list[bool] = []
    original = torch.cuda.Event

    def event(*, blocking: bool = False) -> torch.cuda.Event:
        made.append(blocking)
        return original(blocking=blocking)

    model = layers(2)
    monkeypatch.setattr(torch.cuda, "Event", event)
    qmove.park(model)
    qmove.restore(model)
    assert made and all(made)
