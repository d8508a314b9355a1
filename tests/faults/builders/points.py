"""One fault at one point of one operation on one model, and everything that must hold after it."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qmove_core as qmove
import simcuda
from qmove_core import workers
from qmove_core.parking import sleeping, streaming
from tests.builders.interrupts import QMOVE
from tests.faults.builders.faults import (
    FAULTS,
    STOPPED,
    FaultKind,
    TimeOut,
    events,
    raising_handler,
)
from tests.faults.builders.operations import OPERATIONS, Operation
from tests.faults.builders.states import (
    Memory,
    Surroundings,
    differences,
    identities,
    put_back,
    state_of,
)
from tests.faults.builders.subjects import SUBJECTS, Subject

# What an error of ours never is: a mistake in the code that met the fault.
MISTAKES = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NameError,
    TypeError,
    ReferenceError,
    ValueError,
)
_folders = itertools.count()


@dataclass(frozen=True)
class Point:
    """One point: the n-th event of a kind of fault, in one operation on one model; and, for two
    faults in one operation, another one, which may strike before, behind it, or while the first one
    is undone."""

    subject: str
    operation: str
    fault: str
    nth: int
    second: str = ""
    second_nth: int = 0

    def __str__(self) -> str:
        second = f" & {self.second}/{self.second_nth}" if self.second else ""
        return f"{self.subject}/{self.operation}/{self.fault}/{self.nth}{second}"

    @classmethod
    def of(cls, text: str) -> Point:
        first, _, second = text.partition(" & ")
        subject, operation, fault, nth = first.rsplit("/", 3)
        name, _, number = second.partition("/")
        return cls(subject, operation, fault, int(nth), name, int(number or 0))

    def faults(self) -> list[tuple[FaultKind, int]]:
        """Each kind of fault that strikes, with the event at which it does."""
        second = [(FAULTS[self.second], self.second_nth)] if self.second else []
        return [(FAULTS[self.fault], self.nth), *second]


@dataclass(frozen=True)
class Case:
    """An operation on a model, as it goes without a fault.

    Attributes:
        states: those that it may be in, by name: "before", "after", some "between"; each with the
            memory that it takes.
        output: what it computes after it.
        counts: how many events of each kind there are.
    """

    subject: str
    operation: str
    states: dict[str, tuple[dict[str, Any], Memory]]
    output: torch.Tensor
    counts: Counter[str]

    def points(self, chosen_by: random.Random) -> Iterator[Point]:
        """Every point with one fault and as many with two, in an order in which any part of them is
        a fair sample: one of each kind, then again one of each kind."""
        waiting = [self._of_kind(name, chosen_by) for name in FAULTS]
        waiting.append(self._pair(chosen_by) for _ in range(self.number_of_points()))
        while waiting:
            for kind in list(waiting):
                point = next(kind, None)
                if point is None:
                    waiting.remove(kind)
                else:
                    yield point

    def sample(self, chosen_by: random.Random) -> list[Point]:
        """One point of each kind of single fault."""
        names = (name for name, kind in FAULTS.items() if not kind.is_double)
        kinds = (next(self._of_kind(name, chosen_by), None) for name in names)
        return [*filter(None, kinds)]

    def number_of_points(self) -> int:
        """How many there are with one fault."""
        return sum(self.counts[kind.counts] for kind in FAULTS.values())

    def _of_kind(self, name: str, chosen_by: random.Random) -> Iterator[Point]:
        count = self.counts[FAULTS[name].counts]
        for nth in chosen_by.sample(range(1, count + 1), count):
            yield Point(self.subject, self.operation, name, nth)

    def _pair(self, chosen_by: random.Random) -> Point:
        """Two faults of different events (one tracer counts lines, one hook counts copies)."""
        first = self._any(chosen_by, [name for name, k in FAULTS.items() if self.counts[k.counts]])
        others = [
            name
            for name, kind in FAULTS.items()
            if self.counts[kind.counts] and kind.counts != FAULTS[first[0]].counts
        ]
        second = self._any(chosen_by, others) if others else ("", 0)
        return Point(self.subject, self.operation, *first, *second)

    def _any(self, chosen_by: random.Random, names: list[str]) -> tuple[str, int]:
        name = chosen_by.choice(names)
        return name, chosen_by.randint(1, self.counts[FAULTS[name].counts])


def cases() -> list[tuple[str, str]]:
    """The names of every model and every operation that goes with it."""
    return [
        (subject, operation)
        for subject, kind in SUBJECTS.items()
        for operation, op in OPERATIONS.items()
        if op.is_for(kind.tags)
    ]


def case_of(subject_name: str, operation_name: str, folder: Path) -> Case:
    """Runs an operation without a fault: once to load what is loaded at first use, once to look."""
    op = OPERATIONS[operation_name]
    for _attempt in range(2):
        states = {}
        if op.between is not None:
            base, subject = begin(subject_name, op, folder)
            op.between(subject)
            states["between"] = state_of(subject), Memory.now() - base
            del subject
        base, subject = begin(subject_name, op, folder)
        states["before"] = state_of(subject), Memory.now() - base
        counts = events(functools.partial(op.act, subject))
        states["after"] = state_of(subject), Memory.now() - base
        op.home(subject)
        output = subject.forward().cpu()
        streaming.wait_for()
        del subject
    return Case(subject_name, operation_name, states, output, counts)


def begin(name: str, op: Operation, folder: Path) -> tuple[Memory, Subject]:
    """A new model in the state that the operation begins with, and the memory taken before it.

    Nothing is kept of what came before: the first park allocates, page-locks and starts threads.
    """
    gc.collect()
    qmove.trim()
    workers.forget()
    base = Memory.now()
    place = folder / str(next(_folders))
    place.mkdir()
    subject = SUBJECTS[name].build(place)
    op.before(subject)
    return base, subject


def try_point(case: Case, point: Point, folder: Path) -> list[str]:
    """Everything that does not hold after the fault; empty if all does."""
    op = OPERATIONS[case.operation]
    locked = simcuda.host_counters().registered
    base, subject = begin(case.subject, op, folder)
    problems = _problems(case, op, point, subject, base)
    del subject
    with _unraisable():
        _settle(problems)
    left = Memory.now() - base
    if any(left.device) or left.host > 0:
        problems.append(f"when all models were deleted, memory stayed: {left}")
    qmove.trim()
    if (still := simcuda.host_counters().registered - locked) > 0:
        problems.append(f"{still} bytes stay page-locked")
    if problems:
        put_back()
    return problems


def _problems(case: Case, op: Operation, point: Point, subject: Subject, base: Memory) -> list[str]:
    ids, surroundings = identities(subject), Surroundings()
    raised, struck, unraised = act(op, point.faults(), subject)

    problems: list[str] = []
    # Of two faults of the machine, one may be met by what arrives meanwhile.
    _settle([] if len(struck) > 1 and raised is not None else problems)
    state, reached = _reached(case, subject)
    if not reached and STOPPED in (fault for fault, _nth in point.faults()[1:]):
        # An exception of another thread can come between an error and the first instruction of an
        # `__exit__`, where Python cannot hold it back. What that was to do is done when the
        # exception is dropped.
        _drop_frames(raised)
        state, reached = _reached(case, subject)
    memory = Memory.now() - base  # while the exception is alive
    if not reached:
        against = (f"{n} ({differences(state, s)})" for n, (s, _m) in case.states.items())
        problems.append(f"half: not {', nor '.join(against)}")
    for name in reached[:1]:
        wanted = case.states[name][1]
        if memory.device != wanted.device:
            problems.append(f"{name}, but device bytes {memory.device} and not {wanted.device}")
        if memory.host > wanted.host and not op.saves_ram:
            problems.append(f"{name}, but host bytes {memory.host} and not {wanted.host}")
    problems += _of_the_error(raised, struck, unraised, op, reached)
    if "before" in reached and identities(subject) != ids:
        problems.append("other objects")
    problems += surroundings.problems()
    raised = None
    return problems or _once_more(case, op, subject, reached)


def _reached(case: Case, subject: Subject) -> tuple[dict[str, Any], list[str]]:
    """The state it is in, and the names of those that it may be in and is in."""
    state = state_of(subject)
    return state, [name for name, (wanted, _memory) in case.states.items() if state == wanted]


def _drop_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()


def act(
    op: Operation, faults: list[tuple[FaultKind, int]], subject: Subject
) -> tuple[BaseException | None, list[FaultKind], bool]:
    """What it raised, which faults struck, and whether Python had nobody to raise one to."""
    watched: list[tuple[FaultKind, Callable[[], bool]]] = []

    def struck() -> list[FaultKind]:
        return [fault for fault, has_struck in watched if has_struck()]

    with raising_handler(), _unraisable() as unraised:
        try:
            with contextlib.ExitStack() as injected:
                for fault, nth in faults:
                    watched.append((fault, injected.enter_context(fault.inject(nth))))
                op.act(subject)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and not struck():
                raise  # somebody stops the tests
            _clear_frames_of_others(error)
            return error, struck(), bool(unraised)
    return None, struck(), bool(unraised)


def _clear_frames_of_others(error: BaseException | None) -> None:
    """What a kept traceback holds is then qmove's: a forward that raised holds its activations, and
    so does what wakes a module in the middle of it."""
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None:
            name = traceback.tb_frame.f_code.co_filename
            if not name.startswith(QMOVE) or name == sleeping.__file__:
                with contextlib.suppress(RuntimeError):  # it still runs
                    traceback.tb_frame.clear()
            traceback = traceback.tb_next
        error = error.__cause__ or error.__context__


def _of_the_error(
    raised: BaseException | None,
    struck: list[FaultKind],
    unraised: bool,
    op: Operation,
    reached: list[str],
) -> list[str]:
    interrupts = tuple(fault.interrupts for fault in struck if fault.interrupts is not None)
    may_come_last = TimeOut in interrupts
    if len(struck) > 1 and interrupts == (TimeOut,):
        interrupts = ()  # an Exception as any other: that of the machine may take its place
    names = " or ".join(interrupt.__name__ for interrupt in interrupts)
    if raised is None:
        if interrupts and not unraised:
            return [f"{names} was swallowed"]
        return [] if reached != ["before"] else ["it returned, and was not done"]
    told = f"{type(raised).__name__}: {raised}"[:200]
    if interrupts and isinstance(raised, interrupts):
        return []
    if interrupts and not unraised:
        return [f"{names} became {told}"]
    if not isinstance(raised, Exception) or isinstance(raised, MISTAKES):
        return [f"it raised {told}"]
    if op.atomic and reached == ["after"] and not may_come_last:
        return [f"it was done, and raised {told}"]
    return []


def _once_more(case: Case, op: Operation, subject: Subject, reached: list[str]) -> list[str]:
    """The same operation succeeds, and the model computes what it always did."""
    problems: list[str] = []
    try:
        if op.repeatable or "after" not in reached:
            op.act(subject)
        streaming.wait_for()
        state, wanted = state_of(subject), case.states["after"][0]
        if state != wanted and reached != ["between"]:
            problems.append(f"the second time: {differences(state, wanted)}")
        op.home(subject)
        output = subject.forward().cpu()
        if not torch.equal(output, case.output):
            problems.append("it computes something else")
    except Exception as error:
        problems.append(f"the second time it raised {type(error).__name__}: {error}"[:300])
    return problems


def _settle(problems: list[str]) -> None:
    try:
        streaming.wait_for()
    except Exception as error:
        problems.append(f"what arrives still failed later: {type(error).__name__}: {error}"[:300])


@contextmanager
def _unraisable() -> Iterator[list[object]]:
    """Notes what is raised in a finalizer or in another thread, where Python can only print it."""
    seen: list[object] = []
    before = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = threading.excepthook = lambda args: seen.append(args.exc_type)
    try:
        yield seen
    finally:
        sys.unraisablehook, threading.excepthook = before
