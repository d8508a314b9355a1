"""Late copies: a program that forgets to wait sees old bytes, or an error where memory was freed
under the copy."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch

import simcuda

N = 1000


@pytest.fixture
def side():
    return torch.cuda.Stream()


@pytest.fixture(autouse=True)
def _drained():
    yield
    for device in range(2):
        try:
            torch.cuda.synchronize(device)
        except torch.AcceleratorError:  # a copy that the test left behind on purpose
            torch.cuda.synchronize(device)


def late_park(x: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    host = torch.zeros(x.shape, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(x, non_blocking=True)
    return host


def test_a_missing_synchronize_shows_old_bytes(side):
    host = late_park(torch.ones(N, device="cuda"), torch.cuda.current_stream())
    assert host.sum() == 0
    torch.cuda.current_stream().synchronize()
    assert host.sum() == N


def test_an_unrelated_operator_does_not_hurry_a_late_copy():
    x = torch.ones(N, device="cuda")
    host = late_park(x, torch.cuda.current_stream())
    torch.randn(8, device="cuda").mul_(2)
    assert host.sum() == 0
    x.add_(1)  # comes after the copy on the same stream, so that the copy has to run first
    assert host.sum() == N


def test_a_missing_wait_between_streams_shows_old_bytes(side):
    host, x = torch.ones(N, pin_memory=True), torch.zeros(N, device="cuda")
    with torch.cuda.stream(side):
        x.copy_(host, non_blocking=True)
    assert x.sum().item() == 0
    torch.cuda.current_stream().wait_stream(side)
    assert x.sum().item() == N


def test_an_event_waits_for_what_came_before_it_only(side):
    x = torch.ones(N, device="cuda")
    first = late_park(x, side)
    event = side.record_event()
    second = late_park(x, side)
    assert not event.query()
    event.synchronize()
    assert event.query() and first.sum() == N and second.sum() == 0
    side.synchronize()
    assert second.sum() == N


def test_changing_the_source_under_a_late_copy_shows(side):
    host, x = torch.ones(N, pin_memory=True), torch.zeros(N, device="cuda")
    x.copy_(host, non_blocking=True)
    host.fill_(5)
    assert x.sum().item() == 5 * N


def test_pageable_memory_is_copied_at_once(side):
    host, x = torch.ones(N), torch.zeros(N, device="cuda")
    with torch.cuda.stream(side):
        x.copy_(host, non_blocking=True)
        host.zero_()
        host.copy_(x, non_blocking=True)
    assert host.sum() == N


def test_a_source_freed_under_a_late_copy_is_an_error(side):
    x = torch.ones(N, device="cuda")
    late_park(x, side)
    del x
    with pytest.raises(
        torch.AcceleratorError,
        match=r"device-to-host copy of 4000 bytes reads freed memory of cuda:0",
    ):
        side.synchronize()


def test_a_destination_freed_under_a_late_copy_is_an_error(side):
    host, x = torch.ones(N, pin_memory=True), torch.zeros(N, device="cuda")
    with torch.cuda.stream(side):
        x.copy_(host, non_blocking=True)
    del x
    with pytest.raises(
        torch.AcceleratorError, match=r"host-to-device copy of 4000 bytes writes freed memory"
    ):
        side.synchronize()


def test_record_stream_puts_the_free_off(side):
    x = torch.ones(N, device="cuda")
    host, before = late_park(x, side), simcuda.counters().allocated
    x.record_stream(side)
    del x
    assert simcuda.counters().allocated == before
    side.synchronize()
    assert host.sum() == N and simcuda.counters().allocated == before - 4 * N


def test_a_free_behind_a_wait_is_in_order(side):
    x = torch.ones(N, device="cuda")
    host = late_park(x, side)
    torch.cuda.current_stream().wait_stream(side)
    del x
    side.synchronize()
    assert host.sum() == N


def test_a_free_on_the_copys_own_stream_is_in_order():
    x = torch.ones(N, device="cuda")
    host = late_park(x, torch.cuda.current_stream())
    del x
    torch.cuda.synchronize()
    assert host.sum() == N


def test_a_full_device_waits_for_frees_that_were_put_off(side):
    x = torch.ones(1 << 20, dtype=torch.uint8, device="cuda:1")
    side = torch.cuda.Stream(device=1)
    host = torch.empty(x.shape, dtype=torch.uint8, pin_memory=True)
    with torch.cuda.stream(side):
        host.copy_(x, non_blocking=True)
    x.record_stream(side)
    simcuda.set_memory(simcuda.counters(1).allocated, device=1)
    try:
        del x
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda:1")
    finally:
        simcuda.set_memory("4GiB", device=1)
    assert host.sum() == 1 << 20


def test_pytorchs_pinned_memory_outlives_its_tensor_under_a_late_copy(side):
    x = torch.zeros(N, device="cuda")
    x.copy_(torch.ones(N).pin_memory(), non_blocking=True)
    assert x.sum().item() == N
    with simcuda.strict_host_frees():
        x.copy_(torch.ones(N).pin_memory(), non_blocking=True)
        with pytest.raises(torch.AcceleratorError, match="reads pinned host memory that was freed"):
            torch.cuda.synchronize()


@pytest.fixture
def arena():
    memory = mmap.mmap(-1, 1 << 20)
    yield torch.frombuffer(memory, dtype=torch.uint8)


def test_unregistering_under_a_late_copy_is_an_error(arena):
    runtime = torch.cuda.cudart()
    assert runtime.cudaHostRegister(arena.data_ptr(), arena.nbytes, 0) == 0
    x = torch.ones(4096, dtype=torch.uint8, device="cuda")
    arena[:4096].copy_(x, non_blocking=True)
    assert runtime.cudaHostUnregister(arena.data_ptr()) == 0
    with pytest.raises(
        torch.AcceleratorError, match="writes pinned host memory that was freed or unregistered"
    ):
        torch.cuda.synchronize()


def test_registered_memory_that_was_unmapped_is_an_error_and_no_crash():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(
        None,
        1 << 16,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
        -1,
        0,
    )
    host = torch.frombuffer((ctypes.c_char * (1 << 16)).from_address(address), dtype=torch.uint8)
    assert torch.cuda.cudart().cudaHostRegister(address, 1 << 16, 0) == 0
    host.copy_(torch.ones(1 << 16, dtype=torch.uint8, device="cuda"), non_blocking=True)
    libc.munmap(address, 1 << 16)
    with pytest.raises(torch.AcceleratorError, match="freed or unregistered"):
        torch.cuda.synchronize()
    assert torch.cuda.cudart().cudaHostUnregister(address) == 0


def test_copies_between_devices_are_ordered_with_both_current_streams(side):
    x, y = torch.ones(N, device="cuda:0"), torch.zeros(N, device="cuda:1")
    y.copy_(x)
    assert simcuda.queued(torch.cuda.current_stream(0)) > 0, "it is late: the host did not wait"
    assert y.sum().item() == N
    with torch.cuda.stream(side):
        y.copy_(x * 0)
    assert y.sum().item() == 0


def test_streams_and_events_through_each_face():
    assert isinstance(torch.cuda.Stream(), torch.Stream)
    stream = torch.Stream("cuda:1")
    assert stream.device == torch.device("cuda:1")
    with stream:
        assert torch.accelerator.current_stream(1) == stream
        assert torch.cuda.current_stream(1).stream_id == stream.stream_id
    assert torch.cuda.current_stream(1) == torch.cuda.default_stream(1)
    event = torch.Event("cuda")
    event.record(torch.cuda.current_stream())
    event.synchronize()
    assert event.query() and torch.cuda.current_stream().query()
