"""Threads for work that does not hold the GIL: on host memory (copying, touching, checksums), and
reading from a disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

COUNT = min(4, os.cpu_count() or 1)  # more threads than that only wait for the memory
READERS = 4  # that wait for a disk, however few processors there are
_executors: dict[str, ThreadPoolExecutor] = {}


def submit(call: Callable[..., T], *arguments: object) -> Future[T] | None:
    """Calls something in one of them; None where no thread starts. What is called there must not
    wait for what else is submitted."""
    return _submit("qmove-memory", COUNT, call, arguments)


def submit_read(call: Callable[..., T], *arguments: object) -> Future[T] | None:
    """As `submit`, in threads for what reads from a disk."""
    return _submit("qmove-read", READERS, call, arguments)


def _submit(
    name: str, count: int, call: Callable[..., T], arguments: tuple[object, ...]
) -> Future[T] | None:
    if name not in _executors:
        _executors[name] = ThreadPoolExecutor(count, name)
    future: Future[T] = Future()
    try:
        _executors[name].submit(_run, future, call, arguments)
    except RuntimeError:  # a limit on threads, or the interpreter ends
        # The executor keeps what it was given, for when a thread starts: nobody must do it then.
        if future.cancel():
            return None
    return future


def _run(future: Future[T], call: Callable[..., T], arguments: tuple[object, ...]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call(*arguments)
    except BaseException as error:
        future.set_exception(error)
        del future, call, arguments  # the error has this frame
    else:
        future.set_result(result)


def forget() -> None:
    """The next call starts new threads: in a forked child, which has none."""
    _executors.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
