"""Page-locked host memory: what counts as pinned, limits, error codes, the error that a failed pin
leaves behind."""

from __future__ import annotations

import contextlib

import pytest
import torch

import simcuda

runtime = torch.cuda.cudart()


@pytest.fixture
def block():
    """64 KiB of registered host memory."""
    host = torch.zeros(1 << 16, dtype=torch.uint8)
    assert runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0) == runtime.cudaError.success
    yield host
    assert runtime.cudaHostUnregister(host.data_ptr()) == 0


def clear_error():
    with contextlib.suppress(torch.AcceleratorError):
        torch.zeros(1, device="cuda")
    with contextlib.suppress(torch.AcceleratorError):
        torch.cuda.synchronize()
    assert simcuda.last_error() == 0


def test_both_kinds_are_counted_and_the_allocator_rounds_up():
    simcuda.reset_counters()
    before = simcuda.host_counters()
    host = torch.empty(5000, dtype=torch.uint8, pin_memory=True)
    now = simcuda.host_counters()
    assert host.is_pinned() and now.pinned - before.pinned == 8192 and now.pins == 1
    assert now.allocated - before.allocated == 8192
    del host
    assert simcuda.host_counters().pinned == before.pinned
    assert simcuda.host_counters().pinned_peak == before.pinned + 8192


def test_registered_memory_is_pinned_to_its_last_byte(block):
    assert block.is_pinned() and block[100:].is_pinned()
    assert simcuda.host_counters().registered >= 1 << 16
    x = torch.ones(1 << 16, dtype=torch.uint8, device="cuda")
    block.copy_(x, non_blocking=True)
    assert block.sum() == 0, "a copy to registered memory is late"
    torch.cuda.synchronize()
    assert block.sum() == 1 << 16


def test_a_copy_across_two_registrations_is_refused():
    host = torch.zeros(8192, dtype=torch.uint8)
    for start in (0, 4096):
        assert runtime.cudaHostRegister(host.data_ptr() + start, 4096, 0) == 0
    try:
        with pytest.raises(torch.AcceleratorError, match="runs over the end of its pinned range"):
            host.copy_(torch.ones(8192, dtype=torch.uint8, device="cuda"))
    finally:
        for start in (0, 4096):
            runtime.cudaHostUnregister(host.data_ptr() + start)


def test_error_codes_are_cudas(block):
    error = runtime.cudaError
    assert (
        runtime.cudaHostRegister(block.data_ptr() + 64, 64, 0)
        == error.hostMemoryAlreadyRegistered
        == 712
    )
    assert runtime.cudaHostRegister(0, 64, 0) == error.invalidValue
    assert runtime.cudaHostUnregister(block.data_ptr() + 1) == error.hostMemoryNotRegistered
    assert "already mapped" in runtime.cudaGetErrorString(712)
    with pytest.raises(torch.cuda.CudaError):
        torch.cuda.check_error(runtime.cudaHostUnregister(1))
    clear_error()


def test_a_failed_pin_sticks_until_an_operator_raises_it(block):
    assert runtime.cudaHostRegister(block.data_ptr(), 64, 0) != 0
    assert simcuda.last_error() == 712
    block.to("cuda")  # a plain copy does not look
    with pytest.raises(torch.AcceleratorError, match="already mapped"):
        torch.cuda.synchronize()  # drivers queue it on the device besides
    torch.cuda.synchronize()
    assert simcuda.last_error() == 712
    with pytest.raises(torch.AcceleratorError, match="already mapped"):
        torch.ones(1, device="cuda")
    assert torch.ones(1, device="cuda").item() == 1, "raised once, then gone"


def test_a_limit_on_pinned_memory():
    simcuda.set_pinned_limit(simcuda.host_counters().pinned + 4096)
    try:
        with pytest.raises(torch.AcceleratorError, match="out of memory"):
            torch.empty(5000, dtype=torch.uint8, pin_memory=True)
        assert torch.empty(4096, dtype=torch.uint8, pin_memory=True).is_pinned()
        host = torch.zeros(5000, dtype=torch.uint8)
        assert (
            runtime.cudaHostRegister(host.data_ptr(), 5000, 0) == runtime.cudaError.memoryAllocation
        )
        clear_error()
    finally:
        simcuda.set_pinned_limit(None)
