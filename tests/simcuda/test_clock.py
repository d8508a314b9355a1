"""Virtual time: what a copy costs, and that engines, streams and compute overlap exactly as far as
the model says."""

from __future__ import annotations

import dataclasses
import mmap

import pytest
import torch

from simcuda import clock, link

N = 1_000_000
FREE = dataclasses.replace(link.PCIE4, launch=0.0, copy_latency=0.0)


@pytest.fixture(autouse=True)
def fresh_clock():
    torch.cuda.synchronize()
    link.use(FREE)
    yield
    torch.cuda.synchronize()
    link.use("pcie4")
    clock.reset()


@pytest.fixture
def pinned():
    return [torch.ones(N, dtype=torch.uint8, pin_memory=True) for _ in range(2)]


@pytest.fixture
def simulated():
    return [torch.ones(N, dtype=torch.uint8, device="cuda") for _ in range(2)]


UP, DOWN = N / FREE.h2d_pinned, N / FREE.d2h_pinned


def test_a_blocking_copy_costs_the_host_its_time(pinned, simulated):
    clock.reset()
    simulated[0].copy_(pinned[0])
    assert clock.now() == pytest.approx(UP, rel=1e-12)


def test_every_constant_enters(pinned, simulated):
    mine = dataclasses.replace(link.PCIE5, launch=1.0, copy_latency=0.25)
    link.use(mine)
    clock.reset()
    simulated[0].copy_(pinned[0])
    assert clock.now() == pytest.approx(1.25 + N / mine.h2d_pinned, rel=1e-12)


def test_pageable_memory_is_slower_and_holds_the_host(simulated):
    host = torch.ones(N, dtype=torch.uint8)
    clock.reset()
    host.copy_(simulated[0], non_blocking=True)
    assert clock.now() == pytest.approx(N / FREE.d2h_pageable, rel=1e-12)


def test_a_late_copy_costs_the_host_nothing_until_it_waits(pinned, simulated):
    clock.reset()
    pinned[0].copy_(simulated[0], non_blocking=True)
    assert clock.now() == 0
    torch.cuda.synchronize()
    assert clock.now() == pytest.approx(DOWN, rel=1e-12)


def test_the_two_directions_overlap_and_one_direction_does_not(pinned, simulated):
    streams = [torch.cuda.Stream() for _ in range(2)]
    clock.reset()
    with torch.cuda.stream(streams[0]):
        simulated[0].copy_(pinned[0], non_blocking=True)
    with torch.cuda.stream(streams[1]):
        pinned[1].copy_(simulated[1], non_blocking=True)
    torch.cuda.synchronize()
    assert clock.now() == pytest.approx(max(UP, DOWN), rel=1e-12)

    clock.reset()
    for stream, there, here in zip(streams, simulated, pinned, strict=True):
        with torch.cuda.stream(stream):
            there.copy_(here, non_blocking=True)
    torch.cuda.synchronize()
    assert clock.now() == pytest.approx(2 * UP, rel=1e-12)


def test_compute_overlaps_copies_unless_it_waits_for_them(pinned, simulated):
    side = torch.cuda.Stream()
    clock.reset()
    with torch.cuda.stream(side):
        simulated[0].copy_(pinned[0], non_blocking=True)
    clock.compute(3 * UP)
    torch.cuda.synchronize()
    assert clock.now() == pytest.approx(3 * UP, rel=1e-12)

    clock.reset()
    with torch.cuda.stream(side):
        simulated[0].copy_(pinned[0], non_blocking=True)
    torch.cuda.current_stream().wait_stream(side)
    clock.compute(3 * UP)
    torch.cuda.synchronize()
    assert clock.now() == pytest.approx(4 * UP, rel=1e-12)


def test_a_copy_that_is_ready_passes_one_that_waits(pinned, simulated):
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    clock.reset()
    clock.compute(10 * UP, first)
    with torch.cuda.stream(first):
        simulated[0].copy_(pinned[0], non_blocking=True)
    with torch.cuda.stream(second):
        simulated[1].copy_(pinned[1], non_blocking=True)
    assert clock.stream_ready(second) == pytest.approx(UP, rel=1e-12)
    assert clock.stream_ready(first) == pytest.approx(11 * UP, rel=1e-12)


def test_kernels_of_one_device_take_turns_and_two_devices_do_not():
    clock.reset()
    clock.compute(1.0, torch.cuda.Stream())
    clock.compute(1.0, torch.cuda.Stream())
    clock.compute(1.5, torch.cuda.current_stream(1))
    torch.cuda.synchronize(1)
    assert clock.now() == 1.5
    torch.cuda.synchronize(0)
    assert clock.now() == 2.0


def test_events_carry_virtual_time(pinned, simulated):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    clock.reset()
    start.record()
    simulated[0].copy_(pinned[0], non_blocking=True)
    clock.compute(1.0)
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) == pytest.approx((1.0 + UP) * 1e3, rel=1e-12)


def test_polling_ends_and_says_no_before_the_time_has_come(pinned, simulated):
    link.use(dataclasses.replace(FREE, launch=UP / 10))
    clock.reset()
    pinned[0].copy_(simulated[0], non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    polls = 0
    while not event.query():
        polls += 1
    assert polls in (10, 11) and pinned[0].sum() == N
    link.use(FREE)
    clock.compute(1e6)
    polls = 0
    while not torch.cuda.current_stream().query():
        polls += 1
    assert polls == 99, "a clock that does not move must not hang a loop of queries"


def test_pinning_costs_by_the_byte_and_touched_pages_cost_less():
    clock.reset()
    torch.empty(1 << 20, dtype=torch.uint8, pin_memory=True)
    assert clock.now() == pytest.approx((1 << 20) / FREE.pin_untouched, rel=1e-12)
    for touched, rate in ((False, FREE.pin_untouched), (True, FREE.pin_touched)):
        arena = torch.frombuffer(
            mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8
        )
        if touched:
            arena.fill_(1)
        clock.reset()
        assert torch.cuda.cudart().cudaHostRegister(arena.data_ptr(), 1 << 20, 0) == 0
        assert clock.now() == pytest.approx((1 << 20) / rate, rel=1e-2)
        assert torch.cuda.cudart().cudaHostUnregister(arena.data_ptr()) == 0


def test_host_work_and_presets():
    clock.reset()
    clock.host_copy(1000)
    assert clock.now() == 1000 / link.current().host_copy
    link.use("pcie5")
    assert link.current() is link.PCIE5
    with pytest.raises(ValueError, match="pcie4"):
        link.use("isa")
    with pytest.raises(ValueError):
        clock.advance(-1)
