"""Moves that a button asks for wait until no node runs: a model must not leave while it is used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from qmove_core import QMoveError

from .. import advice, browser, progress
from ..guard import log_once
from ..web_requests import settle

Result = TypeVar("Result")
Job = Callable[[], Any]

lock = threading.RLock()  # held while models are moved between nodes
_waiting: deque[Callable[[], None]] = deque()  # jobs, with who is told of their results
_node_runs = False


def run_or_queue(job: Job) -> tuple[bool, Any]:
    """Runs `job` now, or when the node that runs has ended. Its moves can be cancelled.

    Returns:
        Whether it has run, and its result. The result or error of a job that waits goes to the
        browsers.
    """
    with lock:
        if _node_runs:
            _waiting.append(partial(_tell_browsers, job))
            return False, None
        with progress.asked_for():
            return True, job()


def run_when_free(job: Callable[[], Result]) -> Future[Result]:
    """The same for one who waits: the result or error of the job is that of the future."""
    result: Future[Result] = Future()
    result.set_running_or_notify_cancel()
    with lock:
        _waiting.append(partial(settle, job, result))
        if not _node_runs:
            _run_waiting()
    return result


def run_in_background(job: Job) -> None:
    """The same in a thread of its own. The result or error of the job goes to the browsers."""

    def run() -> None:
        with lock:
            _waiting.append(partial(_tell_browsers, job))
            if not _node_runs:
                _run_waiting()

    threading.Thread(target=run, name="qmove request", daemon=True).start()


def run_if_free(job: Job) -> bool:
    """Runs `job` now unless a node runs; returns whether it ran."""
    with lock:
        if _node_runs:
            return False
        with progress.asked_for():
            job()
        return True


def node_begins() -> None:
    """From here on jobs wait. The caller holds the lock."""
    global _node_runs
    _node_runs = True


def node_ended() -> None:
    """Runs the jobs that have waited."""
    global _node_runs
    with lock:
        _node_runs = False
        _run_waiting()


@contextmanager
def paused() -> Iterator[None]:
    """Inside, the node that runs uses no model: it only waits, and jobs need not wait for it."""
    global _node_runs
    before = _node_runs
    node_ended()
    try:
        yield
    finally:
        with lock:
            _node_runs = before


def _run_waiting() -> None:
    while _waiting:
        run = _waiting.popleft()
        with progress.asked_for():
            run()


def _tell_browsers(job: Job) -> None:
    try:
        browser.send(browser.RESULT, {"report": job()})
    except progress.Cancelled as cancelled:
        browser.send(browser.RESULT, {"error": str(cancelled), "cancelled": True})
    except QMoveError as error:  # a refusal, which the report or the log explains
        browser.send(browser.RESULT, advice.told(error))
    except Exception as error:
        log_once("do what was asked for while a node ran", error)
        browser.send(browser.RESULT, advice.told(error))
