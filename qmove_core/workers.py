"""Threads for work on host memory that does not hold the GIL: copying, touching, checksums."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

COUNT = min(4, os.cpu_count() or 1)  # more threads than that only wait for the memory
_executor: ThreadPoolExecutor | None = None


def submit(call: Callable[..., T], *arguments: object) -> Future[T] | None:
    """Calls something in one of them; None where no thread starts. What is called there must not
    wait for what else is submitted."""
    global _executor
    if _executor is None:
        _executor = ThreadPoolExecutor(COUNT, "qmove-memory")
    try:
        return _executor.submit(call, *arguments)
    except RuntimeError:  # a limit on threads, or the interpreter ends
        return None


def forget() -> None:
    """The next call starts new threads: in a forked child, which has none."""
    global _executor
    _executor = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
