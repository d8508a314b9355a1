"""Interrupts at every place where one can come: an exception of a host's own, and Ctrl-C at the
n-th line."""

from __future__ import annotations

import linecache
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import qmove_core as qmove


class Interrupted(BaseException):
    """Like ComfyUI's InterruptProcessingException since 0.33."""


QMOVE = str(Path(qmove.__file__).parent)
ONLY_LOOK = (
    "walk.py",
    "inventory.py",
    "errors.py",
    "live_graph.py",
    "holdings.py",
    "slots.py",
    "budget.py",
    "limits.py",
)  # they cannot leave it half


@contextmanager
def at_line(
    numbers: Collection[int], act: Callable[[], object], file: str = ""
) -> Iterator[Callable[[], int]]:
    """Calls `act` when qmove is about to execute its n-th line, for each of these numbers; yields
    the count of lines.

    Args:
        file: count only lines of files whose names end so.
    """
    lines = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal lines
        name = frame.f_code.co_filename
        if not name.startswith(QMOVE) or name.endswith(ONLY_LOOK) or not name.endswith(file):
            return None
        # A trace function can raise between the body of a `with` and its `__exit__`; no signal
        # arrives there.
        if event == "line" and not linecache.getline(name, frame.f_lineno).lstrip().startswith(
            "with "
        ):
            lines += 1
            if lines in numbers:
                act()
        return trace

    sys.settrace(trace)
    try:
        yield lambda: lines
    finally:
        sys.settrace(None)


def ctrl_c_at_line(number: int) -> AbstractContextManager[Callable[[], int]]:
    """Sends this process a real SIGINT when qmove is about to execute its `number`-th line; yields
    the count of lines."""
    return at_line({number}, lambda: signal.raise_signal(signal.SIGINT))
