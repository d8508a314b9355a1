"""What interrupts a commit leaves no model half in its new place: Ctrl-C and the handlers of other
signals are held back, what another thread raises finds the commit done. And errors of what is done
after a commit."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

from .tracebacks import clear_own_frames

T = TypeVar("T")

log = logging.getLogger("qmove")

# Those whose handlers programs let raise: time-outs, requests to end. Windows has only some.
_NAMES = ("SIGINT", "SIGALRM", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGVTALRM", "SIGPROF")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]

_this_thread = threading.local()
Later = list[Callable[[], object]]  # what is called when interrupts are delivered again


@contextmanager
def interrupts_deferred() -> Iterator[Later]:
    """Runs the body to its end, then delivers the signals that came meanwhile, the first one first.

    Python delivers signals to the main thread only, so elsewhere there is nothing to hold back.
    Inside another one it ends when that ends. Their handlers see the frame in which they are called
    in the end: one inside the body would keep what the body held.

    Yields:
        What is delivered at the end. `not_a_failure` adds to it.
    """
    if (outer := getattr(_this_thread, "later", None)) is not None:
        yield outer
        return
    later: Later = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}

    def hold_back(number: int, _frame: FrameType | None) -> None:
        later.append(lambda: held[number](number, sys._getframe()))

    # Twice: another thread's exception, or a signal whose handler is back already, may end the
    # first one.
    try:
        try:
            for number in held:
                signal.signal(number, hold_back)
            _this_thread.later = later
            yield later
        finally:
            _end_deferring(held)
    finally:
        _end_deferring(held)
        _call_all(later)


def _end_deferring(held: Mapping[int, Callable[..., object]]) -> None:
    _this_thread.later = None
    for number, handler in held.items():
        signal.signal(number, handler)


def _call_all(calls: Later) -> None:
    """Calls and drops all, also when one raises. (A frame that was interrupted may have the list
    among its variables.)"""
    if calls:
        call = calls.pop(0)
        try:
            call()
        finally:
            del call
            _call_all(calls)


def all_or_nothing(step: Callable[[], T], undo: Callable[[], object] = lambda: None) -> T:
    """Carries out a step that can be begun anew from any line of it. What fails twice is undone.

    An exception of another thread (`PyThreadState_SetAsyncExc`) may come at any line, and nothing
    holds it back: then the step is done when it is raised.
    """
    try:
        return step()
    except BaseException:
        try:
            step()
        except BaseException:
            undo()
            raise
        raise


@contextmanager
def cleaning_up(has_failed: bool) -> Iterator[None]:
    """For what must be done after an error, too: what fails in it then is logged, and the first
    error goes on.

    Args:
        has_failed: whether an error is on its way.
    """
    try:
        yield
    except Exception as another:
        if not has_failed:
            raise
        # As text: who keeps the log's record keeps no memory.
        log.error("after an error this failed, too: %s: %s", type(another).__name__, str(another))


@contextmanager
def not_a_failure(later: Later, what: str) -> Iterator[None]:
    """For what is done after a commit: its errors are logged, and interrupts are delivered later.

    Args:
        what: is not done then, for the log: "keep the host copies".
    """
    try:
        yield
    except Exception as error:
        log.exception("could not %s; the move itself is done", what)
        clear_own_frames(error)  # who keeps the log's record keeps no memory
    except BaseException as error:
        interrupt = error  # the name `error` ends with this block

        def raise_it() -> None:
            raise interrupt

        later.append(raise_it)
