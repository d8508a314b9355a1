"""Planned faults strike where they were planned, once, and leave what the plan says."""

from __future__ import annotations

import threading

import pytest
import torch

import simcuda


class Interrupt(BaseException):
    """As ComfyUI's own: no Exception."""


@pytest.fixture
def host():
    return torch.ones(1000)


@pytest.fixture
def target():
    return torch.zeros(1000, device="cuda")


def test_the_nth_allocation_fails(target):
    with simcuda.fail("alloc", nth=2) as fault:
        torch.empty(3, device="cuda")
        assert fault.fired == 0
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 12 bytes"):
            torch.empty(3, device="cuda")
        torch.empty(3, device="cuda")
    assert fault.fired == 1
    torch.empty(3, device="cuda")


@pytest.mark.parametrize("error", [KeyboardInterrupt, Interrupt, ValueError("mine")])
@pytest.mark.parametrize("after_bytes, written", [(None, 500), (0, 0), (400, 100), (10**9, 1000)])
def test_any_exception_in_the_middle_of_a_copy(host, target, error, after_bytes, written):
    with simcuda.fail("copy", nth=2, error=error, after_bytes=after_bytes) as fault:
        target.copy_(host)
        target.zero_()
        with pytest.raises(error if isinstance(error, type) else type(error)):
            target.copy_(host)
    assert fault.fired == 1 and target.sum().item() == written
    target.copy_(host)
    assert target.sum().item() == 1000


def test_the_natural_error_of_a_copy_is_cudas(host, target):
    with simcuda.fail("copy"), pytest.raises(torch.AcceleratorError, match="CUDA error"):
        host.copy_(target)
    assert host[:500].sum() == 0 and host[500:].sum() == 500


def test_a_queued_copy_can_fail_when_it_is_queued_or_when_it_runs(target):
    pinned = torch.ones(1000).pin_memory()
    with simcuda.fail("copy", error=Interrupt), pytest.raises(Interrupt):
        target.copy_(pinned, non_blocking=True)
    assert target.sum().item() == 500
    with simcuda.fail("copy", error=Interrupt, late=True):
        target.copy_(pinned, non_blocking=True)
        with pytest.raises(Interrupt):
            torch.cuda.synchronize()


def test_several_in_a_row(host, target):
    with simcuda.fail("copy", nth=2, times=2, error=Interrupt, after_bytes=0) as fault:
        target.copy_(host)
        for _ in range(2):
            with pytest.raises(Interrupt):
                target.copy_(host)
        target.copy_(host)
    assert fault.fired == 2


def test_pins_fail():
    host = torch.zeros(4096)
    with simcuda.fail("pin", nth=1) as fault:
        assert torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0) == 2
    assert fault.fired == 1 and simcuda.last_error() == 2 and not host.is_pinned()
    with pytest.raises(torch.AcceleratorError):
        torch.ones(1, device="cuda")
    with pytest.raises(torch.AcceleratorError, match="a refused registration left"):
        torch.cuda.synchronize()
    with simcuda.fail("pin", error=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    with simcuda.fail("pinned_alloc"), pytest.raises(torch.AcceleratorError, match="out of memory"):
        host.pin_memory()
    assert host.pin_memory().is_pinned()


def test_a_flipped_bit_shows(host, target):
    with simcuda.flip_bit("copy", nth=2) as fault:
        target.copy_(host)
        assert torch.equal(target.cpu(), host) is False
    assert fault.fired == 1
    target.copy_(host)
    assert torch.equal(target.cpu(), host)


def test_a_callback_sees_each_copy_and_may_stop_it(host, target):
    seen: list[simcuda.CopyNotice] = []
    with simcuda.on_copy(seen.append):
        target.copy_(host)
        target.add_(1)
        host.copy_(target)
        target.to("cuda:1")
    assert [(n.direction, n.nbytes, n.device, n.pinned) for n in seen] == [
        ("h2d", 4000, 0, False),
        ("d2h", 4000, 0, False),
        ("d2d", 4000, 0, False),
    ]

    def stop(notice: simcuda.CopyNotice) -> None:
        raise Interrupt(notice.nbytes)

    target.zero_()
    with simcuda.on_copy(stop), pytest.raises(Interrupt, match="4000"):
        target.copy_(host)
    assert target.sum().item() == 0


def test_a_raised_exception_carries_its_own_object(host, target):
    mine = ValueError("the very one")
    with simcuda.fail("copy", error=mine), pytest.raises(ValueError) as caught:
        target.copy_(host)
    assert caught.value is mine


def test_threads_share_the_machine_and_not_their_current_stream():
    problems: list[BaseException] = []

    def work(device: int) -> None:
        try:
            torch.cuda.set_device(device)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for _ in range(200):
                    x = torch.ones(100, pin_memory=True).to("cuda", non_blocking=True)
                    assert (x + x).sum().item() == 200 and x.get_device() == device
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(i % 2,)) for i in range(4)]
    with simcuda.on_copy(lambda notice: None):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads) and not problems
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("arguments", [{"kind": "nothing"}, {"kind": "copy", "nth": 0}])
def test_a_plan_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError), simcuda.fail(**arguments):
        pass
