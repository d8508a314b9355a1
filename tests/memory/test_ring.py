"""The pinned ring gives back every slot, also when another thread's exception comes at any line."""

from __future__ import annotations

import pytest

from qmove_core.memory import pinning
from qmove_core.memory.ring import SLOTS, Ring
from tests.builders.arena import MIB
from tests.builders.interrupts import at_line

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]


class Stop(BaseException):
    """What `PyThreadState_SetAsyncExc` raises wherever the thread is."""


def raise_it() -> None:
    raise Stop


def lines_of(step: str) -> int:
    """How many lines a step of a ring runs through."""
    ring = Ring(4 * MIB)
    if step == "end":
        ring.lock(lambda _nbytes: None)
    with at_line((), raise_it, "ring.py") as lines:
        run(ring, step)
    count = lines()
    ring.end()
    return count


def run(ring: Ring, step: str) -> None:
    if step == "end":
        ring.end()
    else:
        ring.lock(lambda _nbytes: None)


@pytest.mark.parametrize("step", ["end", "lock"])
def test_an_exception_at_any_line_leaves_nothing_locked_after_end(step: str) -> None:
    before = pinning.registered_bytes()
    count = lines_of(step)
    assert count > SLOTS
    for number in range(1, count + 1):
        ring = Ring(4 * MIB)
        if step == "end":
            assert ring.lock(lambda _nbytes: None)
        with at_line({number}, raise_it, "ring.py"), pytest.raises(Stop):
            run(ring, step)
        ring.end()
        assert pinning.registered_bytes() == before, f"line {number} of {step}"
        assert ring.nbytes == 0
        assert ring.lock(lambda _nbytes: None), f"no ring any more after line {number}"
        ring.end()


def test_a_second_end_does_nothing() -> None:
    ring = Ring(4 * MIB)
    ring.lock(lambda _nbytes: None)
    ring.end()
    ring.end()
    assert ring.nbytes == 0
