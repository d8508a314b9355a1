"""Guarantee 4, Bounded: peaks of VRAM and RAM are known, and budgets are checked before the first
byte moves."""

from __future__ import annotations

from typing import Any

import psutil
import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.digests import gathering
from qmove_core.memory import arena, limits
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot


def test_a_park_takes_no_extra_vram_but_its_staging(gpu: GPU) -> None:
    model = layers(20, width=1024)
    resident = gpu.allocated()
    assert resident > 2 * copies.STAGING
    gpu.reset_peak()

    qmove.park(model)

    assert resident < gpu.peak() <= resident + copies.STAGING


@pytest.mark.simulated
def test_a_park_from_a_full_device_needs_no_extra_vram(gpu: GPU) -> None:
    model = layers(20, width=1024)
    before, resident = snapshot(model), gpu.allocated()
    torch.cuda.empty_cache()
    full = torch.cuda.memory_reserved()  # what tensors asked for, where nothing is rounded
    simcuda.set_memory(full, device=0)
    gpu.reset_peak()

    for _again in range(2):  # the second time there is no room for digests either
        parked = qmove.park(model)
        assert parked.copied_bytes == parked.nbytes == resident
        assert resident <= gpu.peak() <= full
        assert gpu.allocated() == 0
        parked.restore()
    assert snapshot(model) == before


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("count", "width"), [(8, 64), (20, 1024), (3, 2048)])
def test_a_restore_takes_the_models_own_bytes_and_no_more(
    gpu: GPU, count: int, width: int, stream: bool
) -> None:
    empty = gpu.allocated()
    model = layers(count, width=width)
    parked = qmove.park(model)
    gpu.reset_peak()

    qmove.restore(model, stream=stream)

    pieces = parked.nbytes // (512 << 10) + len(parked.home)
    digests = 128 * pieces + (
        20 << 10
    )  # 32 bytes, to compute and to read them too, and the numbers to multiply with
    if max(holding.nbytes for holding in qmove.inventory(model).holdings) >= gathering.IN_PLACE:
        digests += 5 << 18  # the least staging, where the model is much larger
    assert empty + parked.nbytes <= gpu.peak() <= empty + parked.nbytes + digests


def test_a_park_takes_the_models_own_bytes_of_ram_and_gives_them_back(gpu: GPU) -> None:
    model = layers(8)
    parked = qmove.park(model)

    padding = sum(
        -nbytes % arena.ALIGNMENT for nbytes in [h.nbytes for h in qmove.inventory(model).holdings]
    )
    assert arena.bytes_in_use() == parked.nbytes + padding
    assert qmove.stats().arena_bytes == arena.bytes_in_use()
    parked.restore()
    stats = qmove.stats()
    assert (stats.arena_bytes, stats.mirror_bytes) == (0, parked.nbytes + padding)
    assert arena.bytes_in_use() == stats.mirror_bytes


def test_too_little_vram_leaves_the_model_parked_and_names_the_figures(gpu: GPU) -> None:
    model = layers(8, width=1024)
    parked = qmove.park(model)
    before = snapshot(model)
    lacking = 4 << 20  # more than allocators round, or keep
    held = torch.empty(
        torch.cuda.mem_get_info()[0] - parked.nbytes + lacking, dtype=torch.uint8, device="cuda"
    )
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    free = torch.cuda.mem_get_info()[0] + cached
    assert free < parked.nbytes
    allocated, copies = gpu.allocated(), simcuda.counters().h2d_copies if simcuda.is_active() else 0

    with pytest.raises(qmove.NotEnoughMemory) as raised:
        qmove.restore(model)

    error = raised.value
    assert (error.place, error.needed, error.free) == (
        "cuda:0",
        parked.nbytes,
        free,
    )
    assert str(error.needed) in str(error)
    assert str(error.free) in str(error)
    assert "free VRAM" in str(error)
    assert gpu.allocated() == allocated
    if simcuda.is_active():
        assert simcuda.counters().h2d_copies == copies
    assert snapshot(model) == before
    assert qmove.is_parked(model)
    del held
    qmove.restore(model)
    assert not qmove.is_parked(model)


def test_ram_limit_of_configure_is_kept(gpu: GPU) -> None:
    model = layers(8)
    before = snapshot(model)
    try:
        qmove.configure(ram_limit=1000)
        with pytest.raises(qmove.NotEnoughMemory, match=r"ram_limit of qmove\.configure") as raised:
            qmove.park(model)
    finally:
        qmove.configure(ram_limit=None)

    assert (raised.value.place, raised.value.free) == ("cpu", 1000)
    assert snapshot(model) == before
    assert arena.bytes_in_use() == 0


def test_ram_limit_counts_what_other_parked_models_take(gpu: GPU) -> None:
    first, second = layers(8), layers(8)
    try:
        qmove.configure(ram_limit=qmove.inventory(first).nbytes * 3 // 2)
        qmove.park(first)
        with pytest.raises(qmove.NotEnoughMemory):
            qmove.park(second)
        qmove.restore(first)
        assert qmove.park(second).nbytes > 0
    finally:
        qmove.configure(ram_limit=None)


@pytest.mark.parametrize("limit", ["available RAM", "cgroup limit"])
def test_too_little_ram_stops_a_park_before_the_first_byte(
    gpu: GPU, limit: str, monkeypatch: Any
) -> None:
    model = layers(8)
    before = snapshot(model)
    if limit == "cgroup limit":
        monkeypatch.setattr(limits, "cgroup_free", lambda: 1000)
    else:
        free = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    with pytest.raises(qmove.NotEnoughMemory, match=limit):
        qmove.park(model)

    assert snapshot(model) == before


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="ram_limit"):
        qmove.configure(ram_limit=-1)
