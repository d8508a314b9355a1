"""Every kind of fault: how its n-th event in an operation fails, and how many events there are."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import safetensors
import torch

import simcuda
from tests.builders.interrupts import Interrupted, at_line

FROM_THEN_ON = 1 << 20


class TimeOut(Exception):
    """What the handler of a SIGUSR1 raises, as programs do it with SIGALRM."""


class Stopped(BaseException):
    """What another thread raises in this one."""


@dataclass(frozen=True)
class FaultKind:
    """One way to fail.

    Attributes:
        counts: the events of which the n-th fails, a key of `events`.
        inject: fails the n-th event of its block; yields whether it has struck.
        interrupts: the exception that must come out of the operation as it is: nobody may take it
            for a failure that can be handled. None for errors of the machine, which may be.
        is_double: it strikes twice: only long runs try that, as they do two faults of any kinds.
    """

    counts: str
    inject: Callable[[int], Any]
    interrupts: type[BaseException] | None = None
    is_double: bool = False


# Faults of the simulated machine ------------------------------------------------------------------


def _simulated(kind: str, error: type[BaseException] | None = None, **options: Any) -> FaultKind:
    @contextmanager
    def inject(nth: int) -> Iterator[Callable[[], bool]]:
        with simcuda.fail(kind, nth=nth, error=error, **options) as fault:
            yield lambda: fault.fired > 0

    return FaultKind(kind, inject, error)


# Faults of the system, seen by an audit hook ------------------------------------------------------

AUDITED = {"mmap.__new__": "map", "open": "file"}
# What `Thread.start` calls; its name changed in Python 3.13.
_STARTS = ("_start_new_thread", "_start_joinable_thread")
_on_event: Callable[[str], None] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _on_event is None or event not in AUDITED:
        return
    # What Python opens to import a module, or to show a traceback, is not the operation's.
    if event == "open" and str(arguments[0]).endswith((".py", ".pyc", ".so")):
        return
    if event == "open" and arguments[1] is None and str(arguments[0]).startswith("/sys"):
        return
    _on_event(AUDITED[event])


sys.addaudithook(_hook)


@contextmanager
def _watching(on_event: Callable[[str], None]) -> Iterator[None]:
    """Calls `on_event` with the kind of each event of the system, before it happens."""
    global _on_event

    def told(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            on_event(kind)
            return real(*arguments, **options)

        return call

    with contextlib.ExitStack() as undo:
        # No audit hook sees files that Rust opens, nor threads.
        watched = [(safetensors, "safe_open", "file")]
        watched += [(threading, name, "thread") for name in _STARTS if hasattr(threading, name)]
        for module, name, kind in watched:
            real = getattr(module, name)
            undo.callback(setattr, module, name, real)
            setattr(module, name, told(kind, real))
        _on_event = on_event
        try:
            yield
        finally:
            _on_event = None


def _of_the_system(kind: str, error: Callable[[], BaseException]) -> FaultKind:
    @contextmanager
    def inject(nth: int) -> Iterator[Callable[[], bool]]:
        seen: Counter[str] = Counter()

        def fail_at_the_nth(event: str) -> None:
            seen[event] += 1
            if event == kind and seen[event] == nth:
                raise error()

        with _watching(fail_at_the_nth):
            yield lambda: seen[kind] >= nth

    return FaultKind(kind, inject)


# Waits for a device -------------------------------------------------------------------------------

_WAITS = [
    (torch.cuda.Event, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.cuda, "synchronize"),
    (torch.accelerator, "synchronize"),
]


@contextmanager
def _waits(before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Calls these around each wait of this thread for a device."""
    thread = threading.get_ident()

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == thread:
                before()
            result = real(*arguments, **options)
            if threading.get_ident() == thread:
                after()
            return result

        return wait

    with contextlib.ExitStack() as undo:
        for owner, name in _WAITS:
            real = getattr(owner, name)
            undo.callback(setattr, owner, name, real)
            setattr(owner, name, around(real))
        yield


def _of_a_wait(when: str, error: type[BaseException], interrupts: bool) -> FaultKind:
    """An error of the device is told when the wait ends, an interrupt comes before it."""

    @contextmanager
    def inject(nth: int) -> Iterator[Callable[[], bool]]:
        count = 0

        def fail_at_the_nth() -> None:
            nonlocal count
            count += 1
            if count == nth:
                raise error("injected at a wait")

        hooks = (fail_at_the_nth, _nothing) if when == "before" else (_nothing, fail_at_the_nth)
        with _waits(*hooks):
            yield lambda: count >= nth

    return FaultKind("wait", inject, error if interrupts else None)


def _nothing() -> None:
    pass


# Lines --------------------------------------------------------------------------------------------


def _at_a_line(
    act: Callable[[], object], interrupts: type[BaseException], *, twice: bool = False
) -> FaultKind:
    """At the n-th line; or twice, the second time where the first one is dealt with."""

    @contextmanager
    def inject(nth: int) -> Iterator[Callable[[], bool]]:
        numbers = {nth, nth + 1 + nth * 31 % 61} if twice else {nth}
        with at_line(numbers, act) as lines:
            yield lambda: lines() >= nth

    return FaultKind("line", inject, interrupts, is_double=twice)


def _handle(_number: int, _frame: FrameType | None) -> None:
    raise TimeOut


@contextmanager
def raising_handler() -> Iterator[None]:
    """Inside, a SIGUSR1 raises TimeOut wherever the main thread is."""
    before = signal.signal(signal.SIGUSR1, _handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _raise_as_another_thread() -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(threading.get_ident()), ctypes.py_object(Stopped)
    )


FAULTS: dict[str, FaultKind] = {
    "device allocation": _simulated("alloc"),
    "device allocations from then on": _simulated("alloc", times=FROM_THEN_ON),
    "Ctrl-C in a device allocation": _simulated("alloc", KeyboardInterrupt),
    "page-locking refused": _simulated("pin"),
    "Ctrl-C in page-locking": _simulated("pin", KeyboardInterrupt),
    "copy before its first byte": _simulated("copy", after_bytes=0),
    "copy half done": _simulated("copy"),
    "copies from then on": _simulated("copy", times=FROM_THEN_ON),
    "late copy": _simulated("copy", late=True),
    "copy stopped by a host": _simulated("copy", Interrupted),
    "wait fails": _of_a_wait("after", RuntimeError, interrupts=False),
    "Ctrl-C in a wait": _of_a_wait("before", KeyboardInterrupt, interrupts=True),
    "host allocation": _of_the_system("map", lambda: OSError(errno.ENOMEM, "injected: no memory")),
    "file": _of_the_system("file", lambda: OSError(errno.EIO, "injected: input/output error")),
    "thread start": _of_the_system("thread", lambda: RuntimeError("can't start new thread")),
    "Ctrl-C at a line": _at_a_line(lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt),
    "raising handler at a line": _at_a_line(lambda: signal.raise_signal(signal.SIGUSR1), TimeOut),
    "Ctrl-C at a line, and again": _at_a_line(
        lambda: signal.raise_signal(signal.SIGINT), KeyboardInterrupt, twice=True
    ),
    "another thread's exception at a line": (
        STOPPED := _at_a_line(_raise_as_another_thread, Stopped)
    ),
}


def events(act: Callable[[], object]) -> Counter[str]:
    """How many events of each kind an operation has, counted while it runs without a fault."""
    seen: Counter[str] = Counter()
    before = [simcuda.counters(index).allocations for index in range(2)]
    pins = simcuda.host_counters().pins

    def note_wait() -> None:
        seen["wait"] += 1

    def note(event: str) -> None:
        seen[event] += 1

    def note_copy(_notice: simcuda.CopyNotice) -> None:
        seen["copy"] += 1

    with (
        simcuda.on_copy(note_copy),
        _waits(note_wait, _nothing),
        _watching(note),
        at_line((), _nothing) as lines,
    ):
        act()
    seen["line"] = lines()
    after = [simcuda.counters(index).allocations for index in range(2)]
    seen["alloc"] = sum(after) - sum(before)
    seen["pin"] = simcuda.host_counters().pins - pins
    return seen
