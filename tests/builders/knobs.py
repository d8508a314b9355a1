"""What must hold of qmove on a simulated device; `tests/simcuda/test_knobs.py` has the knob that
shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import devices, errors, homes
from qmove_core.cli.doctor import examine
from qmove_core.memory import arena, pinning, unlocking
from simcuda.counters import integrated
from tests.builders.arena import pinned_storage
from tests.builders.byte_tensors import MIB, equal, on_host, tensors
from tests.builders.models import layers


class Switch:
    """A fault that strikes only in a part of what is tried, if it is on.

    Args:
        fault: makes it.
    """

    def __init__(self, fault: Callable[[], AbstractContextManager[Any]]) -> None:
        self._fault, self._is_on = fault, False

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def __call__(self) -> AbstractContextManager[Any]:
        return self._fault() if self._is_on else contextlib.nullcontext()


@contextlib.contextmanager
def two_flips() -> Iterator[None]:
    """The first copy may be that of a digest."""
    with contextlib.ExitStack() as flips:
        for nth in (1, 2):
            flips.enter_context(simcuda.flip_bit("copy", nth=nth))
        yield


bits_flip = Switch(two_flips)
copies_fail = Switch(lambda: simcuda.fail("copy", late=True))


def goes_and_comes_home() -> bool:
    model = tensors(3 * MIB, 17 * MIB)
    expected = on_host(model)
    for _again in range(2):
        qmove.park(model)
        qmove.restore(model)
    return equal(model, expected)


def what_no_device_has_room_for_is_refused_with_figures() -> bool:
    model = tensors(3 * MIB)
    qmove.park(model)
    try:
        qmove.restore(model)
    except qmove.NotEnoughMemory as error:
        return error.needed == 3 * MIB
    return True  # there was room


def others_find_no_error_after_a_park() -> bool:
    model = tensors(3 * MIB)
    qmove.park(model)
    ones = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    return bool(ones.sum().item() == 3)


def no_other_context_is_made() -> bool:
    model = layers(2)
    qmove.park(model)
    with torch.cuda.device(1):  # a thread whose current device is another
        simcuda.reset_contexts()
        torch.cuda.synchronize(0)
        pinning._device_in_use()
        devices.is_capturing()
        for index in range(2):
            devices.memory_without_context(torch.device("cuda", index))
    return simcuda.contexts() == [0]


def nothing_is_left_on_the_device() -> bool:
    before = torch.cuda.memory_allocated()
    model = layers(2, width=512)
    qmove.park(model)
    qmove.restore(model)
    qmove.park(model)
    return torch.cuda.memory_allocated() == before


def nothing_is_unlocked_from_park_to_park() -> bool:
    qmove.configure(keep_mirrors=False)
    model = tensors(3 * MIB)
    for _again in range(3):
        qmove.park(model)
        qmove.restore(model)
    unlocking.wait()
    return simcuda.driver_counters("unpin").seconds == 0


def nobody_holds_a_lock_of_ours_while_memory_is_unlocked() -> bool:
    storage, block = pinned_storage(16 * MIB)
    del storage, block
    model = tensors(3 * MIB)
    held = list[bool]()

    def look(call: simcuda.DriverCall) -> None:
        if call.kind == "unpin":  # of the thread that makes it
            held.append(is_owned(arena._lock) or is_owned(homes.lock))

    with simcuda.on_driver_call(look):
        qmove.park(model)  # the spare does not fit, and is given back
        unlocking.wait()
    assert held, "nothing was unlocked"
    return not any(held)


def is_owned(lock: Any) -> bool:
    return bool(lock._is_owned())  # the standard library's own conditions ask a lock so


def no_call_keeps_the_driver_for_long() -> bool:
    model = tensors(100 * MIB)
    sizes = list[int]()
    with simcuda.on_driver_call(lambda call: sizes.append(call.nbytes)):
        qmove.park(model)
    return max(sizes) <= 64 * MIB


def the_driver_gets_it_back_for_others() -> bool:
    before = torch.cuda.memory_reserved()
    model = layers(4, width=1024)
    qmove.park(model)
    qmove.restore(model)
    qmove.park(model)
    return torch.cuda.memory_reserved() == before


def the_cache_is_emptied_once_for_several() -> bool:
    models = [tensors(3 * MIB) for _ in range(3)]
    simcuda.reset_counters()
    simcuda.clock.reset()
    with devices.released_once():
        for model in models:
            qmove.park(model)
    return simcuda.driver_counters("free").seconds <= 6 * simcuda.link.current().segment_free and (
        simcuda.allocator_counters().emptied <= 1
    )


def parked_bytes_are_page_locked() -> bool:
    model = tensors(3 * MIB)
    qmove.park(model)
    return simcuda.host_counters().registered == 3 * MIB


def everything_crosses_from_locked_memory() -> bool:
    seen = list[bool]()
    model = tensors(100 * MIB)
    with simcuda.on_copy(lambda copy: seen.append(copy.pinned or copy.nbytes < MIB)):
        qmove.park(model)
        qmove.restore(model)
    return all(seen)


def the_second_park_copies_nothing() -> bool:
    model = tensors(3 * MIB)
    qmove.park(model)
    qmove.restore(model)
    sizes = list[int]()
    with simcuda.on_copy(lambda copy: sizes.append(copy.nbytes)):
        qmove.park(model)
    return sum(sizes) < MIB


def a_bad_copy_is_found() -> bool:
    qmove.configure(verify=True)
    qmove.park(tensors(MIB))  # digests were tried out then
    model = tensors(3 * MIB)
    expected = on_host(model)
    try:
        with bits_flip():
            qmove.park(model)
    except qmove.CorruptedCopy:
        return equal(model, expected)
    qmove.restore(model)
    return equal(model, expected)


def a_failed_arrival_leaves_it_parked() -> bool:
    qmove.configure(keep_mirrors=False)  # a digest would wait for each copy here
    model = torch.nn.Sequential(
        *[torch.nn.Linear(2112, 2112, bias=False, device="cuda") for _ in range(2)]
    ).requires_grad_(False)  # large ones cross by themselves
    qmove.park(model)
    x = torch.ones(1, 2112, device="cuda")
    with copies_fail():
        qmove.restore(model, stream=True)
        try:
            model(x)
        except RuntimeError:
            return qmove.is_parked(model)
    return not qmove.is_parked(model)


def a_lost_device_is_named() -> bool:
    model = tensors(3 * MIB)
    qmove.park(model)
    with simcuda.lost_context(0), pytest.raises(qmove.QMoveError) as raised:
        qmove.restore(model)
    return isinstance(raised.value, errors.DeviceLost)


def a_capture_is_left_alone() -> bool:
    qmove.configure(pin_limit=0)  # a capture refuses to unlock, and so would keep it
    model = tensors(3 * MIB)
    qmove.park(model)
    with simcuda.capturing(), pytest.raises(qmove.QMoveError):
        qmove.restore(model)
    return True


def the_doctor_says_where_parking_gains_nothing() -> bool:
    said = any("shares its memory" in finding for finding in examine().findings)
    return said == (0 in integrated)


def what_is_queued_is_waited_for() -> bool:
    """A park of bytes that are still on their way to the device, on the default stream."""
    (model,) = tensors(3 * MIB)
    new = torch.full((3 * MIB,), 7, dtype=torch.uint8).pin_memory()
    model.copy_(new, non_blocking=True)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        qmove.park([model])
    return bool((model.cpu() == 7).all())


def room_is_asked_for_before_the_first_byte() -> bool:
    model = tensors(*[3 * MIB] * 6)
    qmove.park(model)
    # Of 64 MiB all but 10, whatever earlier tests have left there.
    others = 54 * MIB - torch.cuda.memory_allocated()
    taken = torch.empty(others, dtype=torch.uint8, device="cuda")
    simcuda.reset_counters()
    try:
        qmove.restore(model)
    except qmove.NotEnoughMemory:
        return simcuda.counters().h2d_bytes == 0
    finally:
        del taken
    return True


def pytorchs_pinned_allocator_is_not_used() -> bool:
    with simcuda.fail("pinned_alloc", times=1000) as fault:
        ok = goes_and_comes_home()
    return ok and fault.fired == 0
