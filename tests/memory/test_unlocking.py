"""Memory is unlocked in the background: a park does not wait for it, nobody holds a lock meanwhile,
and the process ends without it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, budget, giving_back, limits, pinning, unlocking
from qmove_core.memory.blocks import PIECE
from tests.builders.arena import MIB, block_of, nothing, pinned_storage
from tests.builders.byte_tensors import equal, on_host, tensors
from tests.builders.device import GPU

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]

ROOT = Path(__file__).parents[2]


class Driver:
    """Unlocks nothing until it is opened, and says in which threads it was asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        self.threads: set[str] = set()
        unregister = pinning.unregister

        def gated(address: int) -> bool:
            self.threads.add(threading.current_thread().name)
            self.reached.set()
            assert self.opened.wait(60)
            return unregister(address)

        monkeypatch.setattr(pinning, "unregister", gated)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    driver = Driver(monkeypatch)
    yield driver
    driver.opened.set()
    unlocking.wait()


def spare(nbytes: int) -> None:
    """A locked block that nothing lies in."""
    storage, block = pinned_storage(nbytes)
    del storage, block
    assert arena.spare_bytes() == nbytes


def test_a_park_that_needs_a_new_block_does_not_wait_for_the_old_one(
    gpu: GPU, driver: Driver
) -> None:
    spare(8 * MIB)
    model = tensors(3 * MIB)
    expected = on_host(model)
    qmove.park(model)  # it would hang
    assert driver.reached.wait(60) and not driver.opened.is_set()
    assert equal(model, expected) and arena.spare_bytes() == 0
    assert unlocking.pending() == 8 * MIB
    driver.opened.set()
    unlocking.wait()
    assert driver.threads == {"qmove-unlock"}
    assert simcuda.host_counters().registered == pinning.registered_bytes() == 3 * MIB


def test_moves_go_on_while_somebody_waits_for_a_trim(gpu: GPU, driver: Driver) -> None:
    spare(8 * MIB)
    trimmer = threading.Thread(target=qmove.trim)
    trimmer.start()
    assert driver.reached.wait(60)
    model = tensors(3 * MIB)
    expected = on_host(model)
    qmove.park(model)
    qmove.restore(model)
    assert equal(model, expected) and trimmer.is_alive()
    driver.opened.set()
    trimmer.join(60)
    assert simcuda.host_counters().registered == pinning.registered_bytes()


def test_what_pressure_gives_back_is_unlocked_under_no_lock(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare(8 * MIB)
    monkeypatch.setattr(limits, "cgroup_free", lambda: 0)
    assert giving_back.trim_under_pressure() == 8 * MIB
    assert unlocking.pending() == 8 * MIB


def test_who_needs_the_very_memory_waits_for_it(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAM has no room for both, so the park could not go on before."""
    spare(8 * MIB)
    qmove.configure(ram_limit=9 * MIB)
    arena.trim(wait=False)
    done = threading.Event()

    def need() -> None:
        budget.require_host(budget.Action("park", "a model"), 3 * MIB, 9 * MIB)
        done.set()

    thread = threading.Thread(target=need)
    thread.start()
    assert driver.reached.wait(60) and not done.is_set()
    driver.opened.set()
    thread.join(60)
    assert done.is_set()


@pytest.mark.parametrize("limit", ["qmove's", "the driver's"])
def test_locking_waits_for_as_much_as_it_needs_of_a_limit(limit: str) -> None:
    spare(2 * PIECE)
    taken = simcuda.host_counters().pinned
    if limit == "qmove's":
        qmove.configure(pin_limit=pinning.registered_bytes())
    else:
        simcuda.set_pinned_limit(taken)
    (storage,) = arena.allocate([PIECE], nothing)  # which begins to give the spare back
    arena.trim(wait=False)
    assert block_of(storage).pin(0, PIECE), "there was room when the other was unlocked"
    unlocking.wait()
    assert simcuda.host_counters().registered == PIECE and simcuda.last_error() == 0


def test_where_no_thread_starts_it_is_unlocked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    spare(MIB)

    def refused(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    assert arena.trim(wait=False) == MIB
    assert (unlocking.pending(), simcuda.host_counters().registered) == (0, 0)


def test_what_was_never_locked_goes_back_at_once(driver: Driver) -> None:
    qmove.configure(pin_limit=0)
    (storage,) = arena.allocate([MIB], nothing)
    del storage
    arena.trim()
    assert unlocking.pending() == 0 and not driver.threads


def test_unlocking_costs_time_in_the_simulator() -> None:
    """0.22 s for each GB: as a driver, and no more than one that does it once."""
    spare(8 * MIB)
    simcuda.reset_counters()
    simcuda.clock.reset()
    arena.trim()
    assert simcuda.clock.now() == pytest.approx(8 * MIB / simcuda.link.current().unpin)
    assert simcuda.host_counters().unpins == 1


def test_the_end_of_a_process_unlocks_no_more_than_the_piece_it_is_at() -> None:
    program = """
        import simcuda; simcuda.activate(devices=1, memory="1GiB")
        import sys, threading; sys.path.insert(0, ".")
        from qmove_core.memory import arena, pinning
        from qmove_core.memory.blocks import PIECE
        from tests.builders.arena import pinned_storage
        storage, block = pinned_storage(4 * PIECE)
        reached, opened, unregister = threading.Event(), threading.Event(), pinning.unregister
        def gated(address):
            reached.set()
            opened.wait(60)
            print("unlocked", flush=True)
            return unregister(address)
        pinning.unregister = gated
        del storage, block
        arena.trim(wait=False)
        assert reached.wait(60)
        import atexit
        atexit.register(opened.set)  # before the arena's own
    """
    lines = [line[8:] for line in program.splitlines()]
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", "\n".join(lines)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("unlocked") <= 1 and "Error" not in done.stderr


def test_a_forked_child_waits_for_nothing(driver: Driver) -> None:
    spare(MIB)
    arena.trim(wait=False)
    assert driver.reached.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if not unlocking.wait() and unlocking.pending() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert unlocking.pending() == MIB
