"""Holds back what interrupts a commit, so that no model is left half in its new place: Ctrl-C, and
the handlers of other signals. And errors of what is done after a commit."""

from __future__ import annotations

import functools
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

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
    Inside another one it ends when that ends.

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

    def hold_back(number: int, frame: FrameType | None) -> None:
        handler = handlers[number]
        assert callable(handler)
        later.append(lambda: handler(number, frame))

    held = [number for number, handler in handlers.items() if callable(handler)]
    try:
        for number in held:
            signal.signal(number, hold_back)
        _this_thread.later = later
        yield later
    finally:
        _this_thread.later = None
        restore: list[Callable[[], object]] = [
            functools.partial(signal.signal, n, handlers[n]) for n in reversed(held)
        ]
        _call_all(restore, later)


def _call_all(*lists: list[Callable[[], object]]) -> None:
    """Calls and drops all, also when one raises or is interrupted. (A frame that was interrupted
    may have the list among its variables.)"""
    for calls in lists:
        if calls:
            call = calls.pop(0)
            try:
                call()
            finally:
                del call
                _call_all(*lists)
            return


@contextmanager
def not_a_failure(later: Later, what: str) -> Iterator[None]:
    """For what is done after a commit: its errors are logged, and interrupts are delivered later.

    Args:
        what: is not done then, for the log: "keep the host copies".
    """
    try:
        yield
    except Exception:
        log.exception("could not %s; the move itself is done", what)
    except BaseException as error:
        interrupt = error  # the name `error` ends with this block

        def raise_it() -> None:
            raise interrupt

        later.append(raise_it)
