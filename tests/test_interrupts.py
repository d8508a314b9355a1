"""What interrupts a commit, undoes a change and clears a traceback, each stopped where it hurts."""

from __future__ import annotations

import gc
import signal
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from qmove_core.attributes import Undo, set_aside
from qmove_core.interrupts import all_or_nothing, interrupts_deferred
from qmove_core.tracebacks import keeping_nothing
from tests.builders.interrupts import Interrupted, ctrl_c_at_line


class Step:
    """Appends to a list; fails at some of its calls."""

    def __init__(self, *fails_at: int) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self) -> str:
        self.calls += 1
        if self.calls in self.fails_at:
            raise Interrupted(self.calls)
        return "done"


def test_a_step_that_is_stopped_is_begun_anew_and_the_exception_comes_when_it_is_done() -> None:
    step, undone = Step(1), Step()
    with pytest.raises(Interrupted) as raised:
        all_or_nothing(step, undone)
    assert (step.calls, undone.calls, raised.value.args) == (2, 0, (1,))


def test_a_step_that_fails_twice_is_undone() -> None:
    step, undone = Step(1, 2), Step()
    with pytest.raises(Interrupted) as raised:
        all_or_nothing(step, undone)
    assert (step.calls, undone.calls, raised.value.args) == (2, 1, (2,))


def test_a_step_that_succeeds_is_done_once() -> None:
    step, undone = Step(), Step()
    assert all_or_nothing(step, undone) == "done"
    assert (step.calls, undone.calls) == (1, 0)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no such signal")
def test_ctrl_c_at_any_line_of_holding_back_loses_neither_a_handler_nor_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)
    number, finished, delivered = 0, False, 0
    while not finished:
        number += 1
        try:
            with ctrl_c_at_line(number) as lines, interrupts_deferred():
                pass
            finished = lines() < number
        except KeyboardInterrupt:
            delivered += 1
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1)) == before, number
        with pytest.raises(KeyboardInterrupt):  # nothing is held back any more
            signal.raise_signal(signal.SIGINT)
    assert delivered == number - 1 > 10


def test_a_handler_that_was_held_back_gets_no_frame_of_the_body() -> None:
    seen: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda _number, frame: seen.append(frame.f_code.co_name))
    try:
        with interrupts_deferred():
            signal.raise_signal(signal.SIGTERM)
            assert seen == []
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["<lambda>"]


@pytest.mark.parametrize("stopped_at", [1, 2, 3])
def test_a_change_that_is_undone_may_be_stopped_at_any_step(stopped_at: int) -> None:
    obj, undo = SimpleNamespace(a=1, b=2, c=3), Undo()
    set_aside(undo, obj, ["a"], b=20)
    set_aside(undo, obj, ["c"], d=4)
    step = Step(stopped_at)
    for _ in range(3):
        undo.note(step)
    assert vars(obj) == {"b": 20, "d": 4}

    with pytest.raises(Interrupted):
        all_or_nothing(undo.undo)

    assert list(vars(obj).items()) == [("a", 1), ("b", 2), ("c", 3)]
    undo.undo()  # it is forgotten
    assert step.calls == 6


class Big:
    """What must not be kept."""


# As if it were a function of qmove's: only its frames are cleared.
OURS = """
def a_comprehension(make, fail):
    big = make()
    return [(big, fail()) for _ in range(3)]
def a_function(make, fail):
    big = make()
    def inner():
        return big, fail()
    inner()
def one_inside_another(make, fail):
    big = make()
    return [(lambda: [(big, fail()) for _ in range(2)])() for _ in range(2)]
"""


@pytest.mark.parametrize("name", ["a_comprehension", "a_function", "one_inside_another"])
def test_a_kept_exception_keeps_no_variable_of_ours_nor_what_closures_share(name: str) -> None:
    space: dict[str, Any] = {"__name__": "qmove_core.planted"}
    exec(OURS, space)
    seen: list[weakref.ref[Big]] = []

    def make() -> Big:
        big = Big()
        seen.append(weakref.ref(big))
        return big

    def fail() -> None:
        of_others = Big()
        seen.append(weakref.ref(of_others))
        raise Interrupted

    with pytest.raises(Interrupted) as raised, keeping_nothing():
        space[name](make, fail)

    gc.collect()
    ours, of_others = (ref() for ref in seen)
    assert ours is None
    assert of_others is not None and raised.value is not None
