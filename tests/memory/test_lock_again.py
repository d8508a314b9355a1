"""What could not be page-locked when a model was parked is locked later, when there is room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

import qmove_core as qmove
import simcuda
from qmove_core import homes
from qmove_core.memory import arena, blocks, giving_back, limits, lock_again, pinning, unlocking
from qmove_core.memory.blocks import PIECE
from tests.builders.arena import block_of, pinned_storage
from tests.builders.byte_tensors import MIB, equal, on_host, tensors
from tests.builders.device import GPU

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]


@pytest.fixture(autouse=True)
def _no_other_limit() -> Iterator[None]:
    yield
    simcuda.set_pinned_limit(None)


class Driver:
    """Counts how often it is asked to lock memory."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, call: simcuda.DriverCall) -> None:
        self.asked += call.kind == "pin"


def parked_unlocked(*sizes: int) -> tuple[list, list]:
    """A parked model of which the driver locked nothing, and its bytes."""
    model = tensors(*sizes)
    expected = on_host(model)
    simcuda.set_pinned_limit(0)
    qmove.park(model)
    assert pinning.registered_bytes() == 0
    return model, expected


def test_it_is_locked_when_there_is_room_again(gpu: GPU) -> None:
    model, expected = parked_unlocked(100 * MIB, 3 * MIB)
    simcuda.set_pinned_limit(None)
    assert lock_again.look() == simcuda.host_counters().registered == 103 * MIB
    locked = list[bool]()
    with simcuda.on_copy(lambda copy: locked.append(copy.pinned or copy.nbytes < MIB)):
        qmove.restore(model)
    assert all(locked) and equal(model, expected)


def test_what_qmove_itself_has_unlocked_is_room_too(gpu: GPU) -> None:
    held, _block = pinned_storage(8 * MIB)
    qmove.configure(pin_limit=8 * MIB)
    model = tensors(3 * MIB)
    qmove.park(model)
    assert pinning.registered_bytes() == 8 * MIB and lock_again.look() == 0
    del held, _block
    arena.trim()
    assert [lock_again.look() for _ in range(3)][-1] + pinning.registered_bytes() >= 3 * MIB
    assert pinning.registered_bytes() == 3 * MIB


def test_who_is_refused_again_asks_ever_more_rarely(gpu: GPU) -> None:
    model, _expected = parked_unlocked(200 * MIB)
    driver = Driver()
    with simcuda.on_driver_call(driver):
        for _look in range(300):
            assert lock_again.look() == 0
    assert 5 <= driver.asked <= 12, "of four pieces and 300 looks"
    assert simcuda.last_error() == 0
    simcuda.set_pinned_limit(None)
    assert sum(lock_again.look() for _look in range(64)) == 200 * MIB
    del model


def test_a_limit_that_is_reached_half_way_is_kept(gpu: GPU) -> None:
    model, expected = parked_unlocked(3 * PIECE)
    simcuda.set_pinned_limit(PIECE + MIB + simcuda.host_counters().pinned)
    assert lock_again.look() == simcuda.host_counters().registered == PIECE
    qmove.restore(model)
    assert equal(model, expected)


def test_what_is_allowed_to_nobody_is_not_asked_for(gpu: GPU) -> None:
    model, _expected = parked_unlocked(3 * MIB)
    simcuda.set_pinned_limit(None)
    qmove.configure(pin_limit=0)
    driver = Driver()
    with simcuda.on_driver_call(driver):
        assert lock_again.look() == 0 and driver.asked == 0
    del model


def test_while_a_move_runs_nothing_is_locked_and_nobody_waits(gpu: GPU) -> None:
    model, _expected = parked_unlocked(3 * MIB)
    simcuda.set_pinned_limit(None)
    locked = list[int]()
    thread = threading.Thread(target=lambda: locked.append(lock_again.look()))
    with homes.lock:
        thread.start()
        thread.join(60)
        assert locked == [0]
    assert lock_again.look() == 3 * MIB
    del model


def test_where_ram_is_short_nothing_is_locked(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _expected = parked_unlocked(3 * MIB)
    simcuda.set_pinned_limit(None)
    with monkeypatch.context() as patched:
        patched.setattr(limits, "cgroup_free", lambda: 0)
        assert lock_again.look() == 0
    assert lock_again.look() == 3 * MIB
    del model


def test_pieces_in_which_nothing_lies_stay_as_they_are(gpu: GPU) -> None:
    simcuda.set_pinned_limit(0)
    first, second = arena.allocate([2 * PIECE, MIB], lambda _cdata: None)
    block = block_of(second)
    assert not block.pin(0, block.nbytes)
    del first
    simcuda.set_pinned_limit(None)
    assert lock_again.look() == block.pinned_bytes == MIB


def test_a_block_that_is_given_back_is_not_locked_again(gpu: GPU) -> None:
    model, _expected = parked_unlocked(3 * MIB)
    (block,) = arena.blocks_in_use()
    block.stop_pinning()
    simcuda.set_pinned_limit(None)
    assert lock_again.look() == 0 and not block.pin(0, block.nbytes)
    del model, block


def test_the_thread_that_looks_after_memory_does_it(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _expected = parked_unlocked(3 * MIB)
    simcuda.set_pinned_limit(None)
    locked = threading.Event()
    look: Callable[[], int] = lock_again.look

    def seen() -> int:
        nbytes = look()
        if nbytes:
            locked.set()
        return nbytes

    monkeypatch.setattr(lock_again, "look", seen)
    watch = giving_back.Watch(look_seconds=0.001)
    watch.start()
    try:
        assert locked.wait(60)
    finally:
        watch.end()
    assert pinning.registered_bytes() == 3 * MIB
    del model


def test_a_block_that_models_come_to_share_is_unlocked_in_the_background(gpu: GPU) -> None:
    """Where RAM has room for it and the shared one together."""
    qmove.configure(share_from=MIB)
    first = tensors(3 * MIB, 3 * MIB)
    second = [tensor.clone() for tensor in first]
    expected = on_host(first)
    qmove.park(first)
    held = list[bool]()

    def look(call: simcuda.DriverCall) -> None:
        if call.kind == "unpin":
            held.append(bool(arena._lock._is_owned() or homes.lock._is_owned()))

    with simcuda.on_driver_call(look):
        qmove.park(second)
        unlocking.wait()
    assert held and not any(held)
    assert {type(block) is blocks.Block for block in arena._blocks.values()} == {False}
    assert equal(first, expected) and equal(second, expected)


def test_what_models_share_is_locked_later_as_well(gpu: GPU) -> None:
    qmove.configure(share_from=MIB)
    simcuda.set_pinned_limit(0)
    first = tensors(3 * MIB, 3 * MIB)
    second = [tensor.clone() for tensor in first]
    qmove.park(first)
    qmove.park(second)
    simcuda.set_pinned_limit(None)
    assert lock_again.look() == simcuda.host_counters().registered == 6 * MIB
