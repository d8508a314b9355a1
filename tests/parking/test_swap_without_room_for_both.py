"""A swap where RAM has room for one of the two models and VRAM for one: the leaving model takes
over the
host memory that the coming one lay in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena
from qmove_core.storages import as_bytes
from qmove_core.transfer import exchange
from tests.builders.device import GPU
from tests.builders.interrupts import Interrupted
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("none_share")]

MIB = 1 << 20


@pytest.fixture(params=[True, False], ids=["mirrors", "no mirrors"], autouse=True)
def keep_mirrors(request: pytest.FixtureRequest) -> Iterator[None]:
    qmove.configure(keep_mirrors=request.param)
    yield


def two_models(leaving: int = 40, coming: int = 40) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """About as many MiB as said: one resident, one parked, and what the parked one is at home.

    RAM has room for the larger one and 5 MiB, VRAM for the larger one alone.
    """
    parked = layers(coming, width=512)
    home = snapshot(parked)
    qmove.park(parked)
    resident = layers(leaving, width=512)
    larger = max(qmove.inventory(model).nbytes for model in (parked, resident))
    simcuda.set_memory(larger + torch.cuda.memory_allocated() - _on_gpu(resident), device=0)
    qmove.configure(ram_limit=max(larger, arena.bytes_held()) + 5 * MIB)
    return resident, parked, home


def _on_gpu(model: nn.Module) -> int:
    return qmove.inventory(model).by_device.get("cuda:0", 0)


@pytest.mark.parametrize("counts", [(40, 40), (40, 20), (20, 40)], ids=str)
def test_two_models_of_40_where_ram_and_vram_have_room_for_one(
    gpu: GPU, counts: tuple[int, int]
) -> None:
    leaving, coming, home = two_models(*counts)
    before = snapshot(leaving)
    if counts[0] == 40:
        with pytest.raises(qmove.NotEnoughMemory):  # one after the other does not fit
            qmove.park(leaving)
    simcuda.reset_counters()
    nbytes = [qmove.inventory(model).nbytes for model in (leaving, coming)]

    gone, came = qmove.swap(leaving, coming)

    assert (gone.copied_bytes, came.copied_bytes) == tuple(nbytes)
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (True, False)
    assert snapshot(coming) == home
    assert _on_gpu(leaving) == 0
    if counts == (40, 40):
        assert arena.bytes_held() <= nbytes[1] + 5 * MIB
        qmove.swap(coming, leaving)
        assert snapshot(leaving) == before


def test_a_few_large_storages_take_turns_for_ever_in_room_for_one_model_and_two_of_them(
    gpu: GPU, keep_mirrors: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gaps that earlier swaps left are closed; no swap takes more memory than the first."""
    first, second = layers(4, width=512), layers(4, width=513)
    homes_of = {model: snapshot(model) for model in (first, second)}
    qmove.park(first)
    larger = qmove.inventory(second).nbytes
    simcuda.set_memory(larger + torch.cuda.memory_allocated() - larger, device=0)
    qmove.configure(ram_limit=larger + 2 * qmove.inventory(second).holdings[0].nbytes)
    slides: list[int] = []
    move_memory = exchange.ctypes.memmove
    monkeypatch.setattr(
        exchange.ctypes, "memmove", lambda *args: (slides.append(args[2]), move_memory(*args))
    )
    parked, resident = first, second

    for _swap in range(8):
        qmove.swap(resident, parked)
        parked, resident = resident, parked
        assert snapshot(resident) == homes_of[resident]

    assert slides
    assert arena.bytes_held() <= larger + 2 * qmove.inventory(second).holdings[0].nbytes


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("nth", [1, 2, 5, 11, 31, 47, 71])
def test_one_that_fails_leaves_both_where_they_were(gpu: GPU, error: Any, nth: int) -> None:
    leaving, coming, home = two_models()
    before = snapshot(leaving)
    raised = (torch.AcceleratorError,) if error is None else (error,)

    with pytest.raises(raised), simcuda.fail("copy", nth=nth, error=error):
        qmove.swap(leaving, coming)

    assert snapshot(leaving) == before
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (False, True)
    assert _on_gpu(coming) == 0
    qmove.configure(ram_limit=None)
    simcuda.set_memory("4GiB", device=0)
    qmove.restore(coming)
    assert snapshot(coming) == home


def test_a_host_copy_that_somebody_keeps_is_not_written_over(gpu: GPU) -> None:
    leaving, coming, home = two_models()
    # Of the parked model: they look into the arena, and nobody can take them along.
    kept = {name: tensor.numpy() for name, tensor in coming.state_dict().items()}
    content = {name: array.copy() for name, array in kept.items()}
    before = snapshot(leaving)

    with pytest.raises(qmove.NotEnoughMemory):  # its memory cannot be taken over
        qmove.swap(leaving, coming)

    assert all((kept[name] == content[name]).all() for name in kept)
    assert snapshot(leaving) == before
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (False, True)
    qmove.configure(ram_limit=None)
    simcuda.set_memory("4GiB", device=0)
    qmove.restore(coming)
    assert snapshot(coming) == home


def test_a_leaving_model_with_its_host_copy_takes_no_more_room(gpu: GPU) -> None:
    leaving, coming, home = two_models()
    qmove.configure(ram_limit=None, keep_mirrors=True)
    simcuda.set_memory("4GiB", device=0)  # digests take a little room
    qmove.park(leaving)
    qmove.restore(leaving)  # its mirror stays
    qmove.configure(ram_limit=arena.bytes_held())

    gone, _came = qmove.swap(leaving, coming)

    assert gone.copied_bytes == 0
    assert snapshot(coming) == home


def test_where_no_room_is_left_on_the_way_it_is_not_enough_memory_and_both_go_back(
    gpu: GPU,
) -> None:
    leaving, coming, home = two_models(40, 20)
    before = snapshot(leaving)
    # Storages without a tensor are seen only when they stay: their places cannot be taken over.
    kept = [parameter.untyped_storage() for parameter in coming.parameters()]
    content = [storage.clone() for storage in kept]

    with pytest.raises(qmove.NotEnoughMemory) as raised:
        qmove.swap(leaving, coming)

    assert raised.value.place == "cpu"
    pairs = zip(kept, content, strict=True)
    assert all(torch.equal(as_bytes(now), as_bytes(then)) for now, then in pairs)
    assert snapshot(leaving) == before
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (False, True)
    qmove.configure(ram_limit=None)
    simcuda.set_memory("4GiB", device=0)
    qmove.restore(coming)
    assert snapshot(coming) == home


@pytest.mark.parametrize("at", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("ram", ["for both", "for one"])
def test_room_that_another_process_takes_meanwhile_leaves_both_asleep_with_every_byte(
    gpu: GPU, at: float, ram: str
) -> None:
    """There is no way back then: the leaving model is parked, whole where RAM has room."""
    leaving, coming, home = two_models()
    before = snapshot(leaving)
    if ram == "for both":
        qmove.configure(ram_limit=None)
    taken: list[int] = []

    def another_process_takes_room(done: int, total: int) -> None:
        if done > at * total and not taken:
            taken.append(done)
            simcuda.set_memory(torch.cuda.memory_allocated() - 6 * MIB, device=0)

    with pytest.raises(qmove.NotEnoughMemory) as raised:
        qmove.swap(leaving, coming, progress=another_process_takes_room)

    assert raised.value.place == "cuda:0"  # what was in the way of the swap itself
    assert qmove.is_parked(leaving) and qmove.is_parked(coming)
    if ram == "for both" or at == 0.9:
        assert _on_gpu(leaving) == 0
    # The exception is still alive, and keeps nothing.
    assert gpu.allocated() == _on_gpu(leaving) + _on_gpu(coming)
    qmove.configure(ram_limit=None)
    simcuda.set_memory("4GiB", device=0)
    x = torch.ones(1, 512, device=gpu.device)
    leaving(x), coming(x)
    qmove.restore(leaving)
    qmove.restore(coming)
    assert (snapshot(leaving), snapshot(coming)) == (before, home)
