"""A swap where what the leaving model gives up bit by bit lies in pieces (PyTorch's own allocator)."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.actions import Action
from qmove_core.errors import NotEnoughDeviceMemory, NotEnoughMemory
from qmove_core.parking import swapping
from tests.builders.device import GPU
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated
MIB = 1 << 20


@pytest.fixture(autouse=True)
def native(gpu: GPU) -> Iterator[None]:
    torch.cuda.empty_cache()
    kept = simcuda.set_allocator("native")
    yield
    torch.cuda.empty_cache()
    simcuda.set_allocator(kept)


def tensor(mib: int, value: int) -> torch.Tensor:
    return torch.full((mib * MIB,), value, dtype=torch.uint8, device="cuda")


def models() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One that leaves the first quarter of each segment first, and a parked one of large tensors."""
    coming = [tensor(90, 1), tensor(90, 2)]
    qmove.park(coming)
    blocks = [tensor(5, value) for value in range(40)]  # four to a segment
    return [block for first in range(4) for block in blocks[first::4]], coming


def test_the_leaving_model_is_parked_first_then(gpu: GPU, caplog: pytest.LogCaptureFixture) -> None:
    leaving, coming = models()
    before = [t.clone().cpu() for t in leaving]
    simcuda.set_memory(torch.cuda.memory_reserved() + 8 * MIB)
    with caplog.at_level(logging.INFO, "qmove"):
        parked, restored = qmove.swap(leaving, coming)
    assert any("VRAM is in pieces" in record.getMessage() for record in caplog.records)
    assert (parked.nbytes, restored.nbytes) == (200 * MIB, 180 * MIB)
    assert qmove.is_parked(leaving) and not qmove.is_parked(coming)
    assert [(t.is_cuda, t.unique().tolist()) for t in coming] == [(True, [1]), (True, [2])]
    assert torch.cuda.memory_allocated() == gpu.before + 180 * MIB
    simcuda.set_memory("4GiB")
    assert all(map(torch.equal, before, [t.cpu() for t in leaving]))


def test_where_that_does_not_help_both_are_where_they_were(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, coming = models()
    before, other, restore = snapshot(leaving), snapshot(coming), swapping.restore

    def has_no_room(model: object, **options: object) -> object:
        if model is coming:
            action = Action("restore", model)
            raise NotEnoughDeviceMemory(action, "cuda:0", 1, 0, "free VRAM", "Park another.")
        return restore(model)

    monkeypatch.setattr(swapping, "restore", has_no_room)
    simcuda.set_memory(torch.cuda.memory_reserved() + 8 * MIB)
    with pytest.raises(NotEnoughDeviceMemory, match="free VRAM"):
        qmove.swap(leaving, coming)
    assert qmove.is_parked(coming) and not qmove.is_parked(leaving)
    simcuda.set_memory("4GiB")
    assert snapshot(leaving) == before
    assert snapshot(coming) == other


def test_where_ram_has_no_room_for_both_the_first_reason_is_given(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, coming = models()
    before = snapshot(leaving)

    def refuse(*_args: object, **_options: object) -> None:
        action = Action("park", leaving)
        raise NotEnoughMemory(action, "cpu", 200 * MIB, 0, "available RAM", "Close programs.")

    monkeypatch.setattr(swapping, "park", refuse)
    simcuda.set_memory(torch.cuda.memory_reserved() + 8 * MIB)
    with pytest.raises(NotEnoughDeviceMemory, match="in pieces"):
        qmove.swap(leaving, coming)
    assert qmove.is_parked(coming)
    simcuda.set_memory("4GiB")
    assert snapshot(leaving) == before
