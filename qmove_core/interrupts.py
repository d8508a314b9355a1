"""Holds back Ctrl-C during a commit, so that it never leaves a model half in its new place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Runs the body to its end, then delivers the SIGINT that came meanwhile, if one did.

    Python delivers signals to the main thread only, so elsewhere there is nothing to hold back.
    """
    deliver = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(deliver):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    try:
        signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
        yield
    finally:
        signal.signal(signal.SIGINT, deliver)
        if received:
            deliver(*received[0])
