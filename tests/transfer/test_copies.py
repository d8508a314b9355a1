"""The copies: few, never across two registrations, behind what was queued before them, and as fast
as the link."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena
from qmove_core.transfer import copies as engine
from tests.builders.byte_tensors import MIB, equal, on_host, tensors
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


# How many copies ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_digests")
def test_small_storages_leave_in_one_copy(gpu: GPU) -> None:
    model = layers(40)
    before, size = snapshot(model), arena.bytes_for([16384, 256] * 40)
    with copies() as seen:
        parked = qmove.park(model)
    assert [(notice.direction, notice.nbytes) for notice in seen] == [("d2h", size)]
    assert parked.copied_bytes == parked.nbytes
    parked.restore()
    assert snapshot(model) == before


@pytest.mark.usefixtures("no_digests")
def test_small_storages_come_in_batches_of_at_most_half_of_what_is_still_to_come(gpu: GPU) -> None:
    model = layers(40)
    parked = qmove.park(model)
    with copies() as seen:
        parked.restore()
    left = parked.nbytes
    for notice in seen:
        assert notice.direction == "h2d"
        assert notice.nbytes <= max(left // 2, 16384), (
            "its staging would take more than the model's own bytes"
        )
        left -= notice.nbytes
    assert left == 0
    assert len(seen) <= 14, "of 80 storages: each time half of the rest, but for the last few"


@pytest.mark.usefixtures("no_digests", "scaled_down")
@pytest.mark.parametrize("stream", [False, True])
def test_large_storages_are_copied_alone_and_in_pieces_at_the_borders_of_registrations(
    gpu: GPU, stream: bool
) -> None:
    sixteenths = [20, 20, 20, 20, 130]  # of a MiB
    pieces = [20, 20, 20, 4, 16, 48, 64, 18]
    model = tensors(*[size * MIB // 16 for size in sixteenths])
    expected = on_host(model)
    for direction, act in (
        ("d2h", qmove.park),
        ("h2d", lambda model: qmove.restore(model, stream=stream)),
    ):
        with copies() as seen:
            act(model)
        assert [(notice.direction, notice.nbytes * 16 // MIB) for notice in seen] == [
            (direction, n) for n in pieces
        ]
        assert all(notice.pinned and notice.non_blocking for notice in seen)
    assert equal(model, expected)


@pytest.mark.usefixtures("no_digests", "scaled_down")
def test_batches_end_at_the_borders_of_registrations(gpu: GPU) -> None:
    model = tensors(*[10 * MIB // 16] * 15)  # the 7th and the 13th lie across a border
    expected = on_host(model)
    with copies() as seen:
        qmove.park(model)
    assert [notice.nbytes * 16 // MIB for notice in seen] == [30, 30, 4, 6, 30, 20, 8, 2, 20]
    assert all(notice.pinned for notice in seen)
    qmove.restore(model)
    assert equal(model, expected)


def test_a_storage_of_no_bytes_is_no_copy(gpu: GPU) -> None:
    model = [
        torch.empty(0, device="cuda"),
        torch.ones(3, device="cuda"),
        torch.empty(0, 7, device="cuda"),
    ]
    for _ in range(2):
        qmove.park(model)
        qmove.restore(model)
    assert [tensor.device for tensor in model] == [gpu.device] * 3
    assert [tuple(tensor.shape) for tensor in model] == [(0,), (3,), (0, 7)]


@pytest.mark.usefixtures("scaled_down")
def test_progress_counts_every_byte_once(gpu: GPU) -> None:
    model = tensors(2 * MIB, 3, 7 * MIB, 1000, 999)
    total = sum(tensor.nbytes for tensor in model)
    for act in (qmove.park, qmove.restore):
        seen: list[tuple[int, int]] = []
        act(model, progress=lambda done, of, seen=seen: seen.append((done, of)))
        done = [number for number, _of in seen]
        assert done == sorted(set(done)) and done[-1] == total
        assert {of for _done, of in seen} == {total}


# What waits for what -----------------------------------------------------------------------------


def test_a_park_waits_for_the_whole_device_once_and_a_restore_never(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = layers(6, width=512), torch.ones(1, 512, device="cuda")
    expected, before = model(x), snapshot(model)
    waits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    for verify in (False, True):
        qmove.configure(verify=verify)
        for stream in (False, True):
            qmove.park(model)
            assert waits == [gpu.device]
            qmove.restore(model, stream=stream)
            assert torch.equal(model(x), expected)
            assert waits == [gpu.device]
            waits.clear()
    qmove.park(model)
    waits.clear()
    assert torch.equal(model(x), expected)
    assert waits == []
    assert snapshot(model) == before


def test_a_restore_does_not_wait_for_another_streams_work(gpu: GPU) -> None:
    model = layers(4, width=512)
    qmove.park(model)
    other = torch.cuda.Stream()
    simcuda.clock.reset()
    simcuda.clock.compute(10.0, other)
    qmove.restore(model)
    assert simcuda.clock.now() < 1.0


def test_a_park_copies_what_the_kernels_queued_before_it_leave_behind(gpu: GPU) -> None:
    model = layers(2)
    simcuda.clock.reset()
    simcuda.clock.compute(1.0)
    qmove.park(model)
    assert simcuda.clock.now() > 1.0
    simcuda.clock.compute(1.0)  # it may still use what the model's new memory was before
    qmove.restore(model)
    assert simcuda.clock.now() > 2.0


@pytest.mark.parametrize("second_park", [False, True])
@pytest.mark.parametrize("current", ["default", "side"])
@pytest.mark.parametrize("written_on", ["default", "current"])
def test_a_park_waits_for_copies_that_still_write_to_the_weights(
    gpu: GPU, written_on: str, current: str, second_park: bool
) -> None:
    model = layers(3)
    if second_park:
        qmove.park(model).restore()
    fresh = torch.full((64, 64), 7.0).pin_memory()
    default = torch.cuda.default_stream()
    stream = torch.cuda.Stream() if current == "side" else default
    with torch.cuda.stream(stream):
        with torch.cuda.stream(default if written_on == "default" else stream):
            model[1].weight.data.copy_(fresh, non_blocking=True)
        assert simcuda.queued(default) + simcuda.queued(stream) > 0, "it is late"
        qmove.park(model)
    assert torch.equal(model[1].weight, fresh)


@pytest.mark.parametrize("stream", [False, True])
def test_a_restore_waits_for_copies_that_still_read_what_its_memory_was_before(
    gpu: GPU, stream: bool
) -> None:
    model = layers(3)
    before = snapshot(model)
    qmove.park(model)
    old, host = torch.full((1000,), 5.0, device="cuda"), torch.empty(1000).pin_memory()
    host.copy_(old, non_blocking=True)
    del old
    qmove.restore(model, stream=stream)
    assert snapshot(model) == before
    torch.cuda.synchronize()
    assert bool((host == 5.0).all())


def test_both_directions_have_streams_of_their_own(gpu: GPU) -> None:
    model = layers(3)
    with copies() as seen:
        qmove.park(model)
        qmove.restore(model)
    streams = {
        direction: {n.stream for n in seen if n.direction == direction}
        for direction in ("d2h", "h2d")
    }
    assert all(len(found) == 1 and 0 not in found for found in streams.values())
    assert streams["d2h"] != streams["h2d"]


# Memory that is not to be had --------------------------------------------------------------------


SIZES = [2 * MIB, 1000, 3 * MIB, 300_000, 500_000, 7]  # a border of registrations inside the third


@pytest.mark.usefixtures("scaled_down")
@pytest.mark.parametrize("stream", [False, True])
def test_from_and_to_pageable_memory_all_is_right(gpu: GPU, stream: bool) -> None:
    qmove.configure(pin_limit=0)
    model = tensors(*SIZES)
    expected = on_host(model)
    with copies() as seen:
        for turn in range(2):
            parked = qmove.park(model)
            assert equal(model, expected)
            assert parked.copied_bytes == (0 if turn else sum(SIZES))
            qmove.restore(model, stream=stream)
            assert equal(model, expected)
    assert not any(notice.pinned for notice in seen if notice.nbytes >= MIB)
    assert simcuda.host_counters().pins == 0


@pytest.mark.usefixtures("no_digests", "scaled_down")
@pytest.mark.parametrize(("room", "copies_at_most"), [(0, 400), (600_000, 300), (3 * MIB, 2)])
def test_on_a_full_device_the_staging_shrinks(gpu: GPU, room: int, copies_at_most: int) -> None:
    model = layers(200)  # 400 storages, 3.2 MiB
    before, resident = snapshot(model), torch.cuda.memory_allocated()
    simcuda.set_memory(resident + room)
    gpu.reset_peak()
    with copies() as seen:
        qmove.park(model)
    assert len(seen) <= copies_at_most
    assert gpu.peak() - (resident - gpu.before) <= min(room, engine.STAGING)
    qmove.restore(model)
    assert snapshot(model) == before
