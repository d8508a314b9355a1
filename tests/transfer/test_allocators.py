"""Moves over PyTorch's real allocators: what they keep, and how often their cache is emptied."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import devices
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated
MIB = 1 << 20


@pytest.fixture(params=["native", "expandable", "async"])
def allocator(request: pytest.FixtureRequest, gpu: GPU) -> Iterator[str]:
    kept = simcuda.set_allocator(request.param)
    simcuda.reset_counters()
    yield request.param
    torch.cuda.empty_cache()
    simcuda.set_allocator(kept)


def test_what_was_parked_is_free_for_other_programs(gpu: GPU, allocator: str) -> None:
    model = layers(12, width=512)
    before, reserved = snapshot(model), torch.cuda.memory_reserved()
    free = torch.cuda.mem_get_info(0)[0] + reserved
    kept = torch.cuda.memory_reserved() - sum(p.nbytes for p in model.parameters())
    for _ in range(2):
        parked = qmove.park(model)
        assert parked.reserved_after is not None
        assert torch.cuda.memory_reserved() <= parked.reserved_after + torch.cuda.memory_allocated()
        assert torch.cuda.mem_get_info(0)[0] == free - torch.cuda.memory_reserved()
        assert torch.cuda.memory_reserved() <= max(kept, 2 * MIB)
        qmove.restore(model)
        assert snapshot(model) == before


def test_reserved_after_counts_what_a_neighbour_keeps_from_the_driver(
    gpu: GPU, allocator: str
) -> None:
    model, beside = [], []
    for _ in range(8):
        model.append(torch.ones(6 * MIB, dtype=torch.uint8, device="cuda"))
        beside.append(torch.ones(4 * MIB, dtype=torch.uint8, device="cuda"))
    parked = qmove.park(model)
    assert torch.cuda.memory_allocated() == gpu.before + 32 * MIB
    assert parked.reserved_after == torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if allocator == "async":
        assert parked.reserved_after < 2 * MIB
    else:
        assert parked.reserved_after == 48 * MIB
    beside.clear()
    devices.release_cached([gpu.device])
    assert devices.unreturned([gpu.device]) < 2 * MIB


def test_a_batch_of_parks_empties_the_cache_once(gpu: GPU, allocator: str) -> None:
    models = [layers(4, width=512) for _ in range(5)]
    before = [snapshot(model) for model in models]
    simcuda.reset_counters()
    with devices.released_once():
        parked = [qmove.park(model) for model in models]
        assert {one.reserved_after for one in parked} == {None}
        assert simcuda.allocator_counters().emptied == 0
        assert devices.free_memory(gpu.device) == (
            torch.cuda.mem_get_info(0)[0]
            + torch.cuda.memory_reserved()
            - torch.cuda.memory_allocated()
        )
    assert simcuda.allocator_counters().emptied == 1
    assert devices.unreturned([gpu.device]) < 2 * MIB
    for model in models:
        qmove.restore(model)
    assert [snapshot(model) for model in models] == before


def test_a_batch_that_fails_empties_the_cache_all_the_same(gpu: GPU, allocator: str) -> None:
    model = layers(4, width=512)
    with pytest.raises(KeyError), devices.released_once():
        qmove.park(model)
        raise KeyError
    assert devices.unreturned([gpu.device]) < 2 * MIB


def test_an_allocator_that_does_not_say_what_it_holds_leaves_the_figure_at_0(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_args: object) -> int:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats.")

    model = layers(2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", refuses)
    assert qmove.park(model).reserved_after == 0
