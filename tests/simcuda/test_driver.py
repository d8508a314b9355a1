"""The driver's lock: who holds it, for how long, and who waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import simcuda
from simcuda.driver import CALLS

MIB = 1 << 20


@pytest.fixture
def host() -> Any:
    memory = torch.ones(4 * MIB, dtype=torch.uint8)
    yield memory
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
    simcuda.library.sim().sim_set_last_error(0)


def lock(memory: torch.Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)
    assert int(code) == 0


def test_each_kind_is_announced_and_counted(host: torch.Tensor) -> None:
    seen = []
    torch.cuda.empty_cache()
    before = simcuda.set_allocator("native")
    try:
        simcuda.reset_counters()
        with simcuda.on_driver_call(seen.append):
            lock(host)
            torch.cuda.cudart().cudaHostUnregister(host.data_ptr())
            first = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
            second = torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")  # from the same segment
            del first, second
            torch.cuda.empty_cache()
    finally:
        simcuda.set_allocator(before)
    assert [(call.kind, call.nbytes) for call in seen] == [
        ("pin", 4 * MIB),
        ("unpin", 0),
        ("malloc", 20 * MIB),
        ("free", 0),
    ]
    counted = {kind: simcuda.driver_counters(kind) for kind in CALLS}
    assert [each.calls for each in counted.values()] == [1, 1, 1, 1]
    unpin = 4 * MIB / simcuda.link.current().unpin
    assert counted["unpin"].seconds == counted["unpin"].longest == pytest.approx(unpin)
    assert counted["free"].longest == pytest.approx(simcuda.link.current().segment_free)
    assert counted["pin"].longest > 0


USES: dict[str, Callable[[torch.Tensor], object]] = {
    "operator": lambda x: x + 1,
    "copy": lambda x: x.cpu(),
    "launch without memory": lambda x: torch.cuda._sleep(0),
    "list of copies": lambda x: torch._foreach_copy_([x], [x.clone()]),
    "allocation": lambda x: torch.empty(3, device="cuda"),
    "question": lambda x: torch.cuda.mem_get_info(),
    "emptied cache": lambda x: torch.cuda.empty_cache(),
    "another registration": lambda x: torch.empty(1, pin_memory=True),
}


@pytest.mark.parametrize("use", USES)
def test_who_uses_a_device_waits_for_who_holds_it(host: torch.Tensor, use: str) -> None:
    x = torch.ones(3, device="cuda")
    holds, begins, never = threading.Event(), threading.Event(), threading.Event()
    order = list[str]()

    def look(call: simcuda.DriverCall) -> None:
        if threading.current_thread().name == "holder":
            holds.set()
            assert begins.wait(60) and not never.wait(0.05)  # time for it to go wrong
            order.append("held")

    def hold() -> None:
        lock(host)

    def other() -> None:
        begins.set()
        USES[use](x)
        order.append("used")

    with simcuda.on_driver_call(look):
        threads = [threading.Thread(target=hold, name="holder"), threading.Thread(target=other)]
        threads[0].start()
        assert holds.wait(60)
        threads[1].start()
        for thread in threads:
            thread.join(60)
    assert order == ["held", "used"]


def test_what_the_callback_raises_the_call_raises_and_the_lock_is_free(host: torch.Tensor) -> None:
    def refuse(call: simcuda.DriverCall) -> None:
        raise KeyboardInterrupt(call.kind)

    with simcuda.on_driver_call(refuse), pytest.raises(KeyboardInterrupt, match="pin"):
        lock(host)
    used = threading.Thread(target=lambda: torch.ones(3, device="cuda").sum().item())
    with simcuda.on_driver_call(lambda call: None):
        used.start()
        used.join(60)
    assert not used.is_alive()
    lock(host)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="warp"):
        simcuda.driver_counters("warp")
