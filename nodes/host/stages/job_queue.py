"""Moves that a button asks for wait until no node runs: a model must not leave while it is used."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .. import browser, progress
from ..guard import log_once

Job = Callable[[], Any]

lock = threading.RLock()  # held while models are moved between nodes
_waiting: deque[Job] = deque()
_node_runs = False


def run_or_queue(job: Job) -> tuple[bool, Any]:
    """Runs `job` now, or when the node that runs has ended. Its moves can be cancelled.

    Returns:
        Whether it has run, and its result. The result or error of a job that waits goes to the
        browsers.
    """
    with lock:
        if _node_runs:
            _waiting.append(job)
            return False, None
        with progress.asked_for():
            return True, job()


def node_begins() -> None:
    """From here on jobs wait. The caller holds the lock."""
    global _node_runs
    _node_runs = True


def node_ended() -> None:
    """Runs the jobs that have waited."""
    global _node_runs
    with lock:
        _node_runs = False
        while _waiting:
            job = _waiting.popleft()
            try:
                with progress.asked_for():
                    browser.send(browser.RESULT, {"report": job()})
            except progress.Cancelled as cancelled:
                browser.send(browser.RESULT, {"error": str(cancelled), "cancelled": True})
            except Exception as error:
                log_once("do what was asked for while a node ran", error)
                browser.send(browser.RESULT, {"error": str(error)})
