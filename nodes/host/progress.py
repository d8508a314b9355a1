"""The progress of each move: on the node for which it happens, in ComfyUI's bar, and in the browser's panel; and what stops it.

A move inside a prompt is stopped by the user's interrupt, one that a button asked for by `cancel`. Both raise in the callback
of the core, which then rolls the move back.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qmove_core import errors

from . import browser, comfy
from .guard import is_interrupt, log_once, never_fails

SECONDS_BETWEEN_UPDATES = 0.1

_WORDS = {"park": ("Parking", "Parked"), "restore": ("Restoring", "Restored")}

_staged_node: ContextVar[str | None] = ContextVar("qmove_staged_node", default=None)
_asked_for: ContextVar[bool] = ContextVar("qmove_asked_for", default=False)
_numbers = itertools.count(1)
_running: dict[int, Move] = {}
_lock = threading.Lock()


class Cancelled(BaseException):
    """Somebody has cancelled the move that a button asked for.

    No Exception, as with asyncio's: on its way out it passes through the host's model management, and nothing there may take it
    for a failure and go on.
    """


class NoSuchMove(ValueError):
    """The move that is to be cancelled is not running, or nobody may cancel it."""


@contextmanager
def for_node(node_id: str) -> Iterator[None]:
    """Inside, moves show on this node: it is about to run, and the host does not yet name it as the one that does."""
    token = _staged_node.set(node_id)
    try:
        yield
    finally:
        _staged_node.reset(token)


@contextmanager
def asked_for() -> Iterator[None]:
    """Inside, moves are those that a button asked for: `cancel` stops them."""
    token = _asked_for.set(True)
    try:
        yield
    finally:
        _asked_for.reset(token)


@contextmanager
def shown(verb: str, name: str, model: int, nbytes: int) -> Iterator[Move]:
    """Shows one move of `nbytes` while it runs; `report` of what it gives is the core's callback. `verb` is "park" or "restore".

    The host unloads models outside of prompts too (POST /free). An interrupt that was left over must not stop that: raised
    there it would end the host's worker.
    """
    move = Move(
        verb,
        name,
        model,
        nbytes,
        _staged_node.get() or comfy.running_node(),
        asked_for=_asked_for.get(),
    )
    with _lock:
        _running[move.number] = move
    move.tell()
    try:
        yield move
        move.state = "done"
    except BaseException as error:
        move.state = (
            "cancelled" if isinstance(error, Cancelled) or is_interrupt(error) else "failed"
        )
        raise
    finally:
        with _lock:
            del _running[move.number]
        move.end()


def running() -> list[dict[str, Any]]:
    """All moves that run now, as plain data."""
    with _lock:
        return [move.to_dict() for move in _running.values()]


def cancel(number: int) -> str:
    """Stops a move; the model stays where it was. Returns what is cancelled: the "move", or the "prompt" that needs it.

    Raises:
        NoSuchMove: it has ended, or it is one that the host needs done.
    """
    with _lock:
        move = _running.get(number)
    if move is None:
        raise NoSuchMove(f"Move {number} is not running: it has ended, or never began.")
    if move.cancels is None:
        raise NoSuchMove(
            f"ComfyUI itself needs the memory of {move.name}; this move cannot be cancelled."
        )
    move.cancel()
    return move.cancels


class Move:
    """One park or restore while it runs.

    Attributes:
        done, total: bytes copied, and to copy; until the core has told the latter, those of the model.
        cancels: what `cancel` stops: the "move", the "prompt" that needs it, or None for nothing.
        state: "running", "done", "cancelled" or "failed".
        result: what the core's call has returned.
    """

    def __init__(
        self, verb: str, name: str, model: int, nbytes: int, node_id: str | None, *, asked_for: bool
    ) -> None:
        self.number = next(_numbers)
        self.verb, self.name, self.model, self.node_id = verb, name, model, node_id
        self.done, self.total = 0, nbytes
        self.state = "running"
        self.result: Any = None
        host = comfy.model_management()
        self.cancels = (
            "prompt" if node_id is not None and host is not None else "move" if asked_for else None
        )
        self._cancelled = False
        self._began = time.monotonic()
        self._seconds: float | None = None
        self._next_update = 0.0
        bar_class = comfy.progress_bar_class()
        self._bar = (
            bar_class(1, node_id=node_id)
            if bar_class is not None and self.cancels == "prompt"
            else None
        )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began if self._seconds is None else self._seconds

    def cancel(self) -> None:
        host = comfy.model_management()
        if self.cancels == "prompt" and host is not None:
            host.interrupt_current_processing(True)
        else:
            self._cancelled = True

    def report(self, done: int, total: int) -> None:
        """The core's callback. Raises the host's InterruptProcessingException, or Cancelled; the core then rolls back."""
        self.done, self.total = done, total
        self._stop_if_asked()
        now = time.monotonic()
        if now < self._next_update and done < total:
            return
        self._next_update = now + SECONDS_BETWEEN_UPDATES
        try:
            self._show()
        except Exception as error:
            if is_interrupt(error):  # the bar asks for it as well
                raise
            log_once("show the progress of a move", error)

    def end(self) -> None:
        """Shows how it ended."""
        self._seconds = self.seconds
        self.tell()
        if self.node_id is not None and self.state == "done":
            self._say_result()

    def to_dict(self) -> dict[str, Any]:
        seconds, running = self.seconds, self.state == "running"
        speed = self.done / seconds if self.done and seconds > 0 else None
        return {
            "id": self.number,
            "verb": self.verb,
            "name": self.name,
            "model": self.model,
            "done": self.done,
            "total": self.total,
            "nbytes": getattr(self.result, "nbytes", None),
            "seconds": round(seconds, 3),
            "bytes_per_second": speed,
            "seconds_left": round((self.total - self.done) / speed, 3)
            if speed and running
            else None,
            "node": self.node_id,
            "cancel": self.cancels if running else None,
            "state": self.state,
        }

    @never_fails("tell the browser of a move", None)
    def tell(self) -> None:
        browser.send(browser.MOVE, self.to_dict())

    def _stop_if_asked(self) -> None:
        host = comfy.model_management()
        if self.cancels == "prompt" and host is not None:
            host.throw_exception_if_processing_interrupted()
        if self._cancelled:
            raise Cancelled(f"{_WORDS[self.verb][0]} {self.name} was cancelled.")

    def _show(self) -> None:
        self.tell()
        if self._bar is not None:
            self._bar.update_absolute(self.done, self.total)
        if self.node_id is not None:
            done, total = errors.readable_bytes(self.done), errors.readable_bytes(self.total)
            say(f"{_WORDS[self.verb][0]} {self.name}: {done} of {total}", self.node_id)

    @never_fails("show the result of a move on its node", None)
    def _say_result(self) -> None:
        assert self.node_id is not None
        nbytes = errors.readable_bytes(getattr(self.result, "nbytes", self.total))
        how = (
            f"in {self.seconds:.1f} s"
            if getattr(self.result, "copied_bytes", self.done)
            else "nothing had to be copied"
        )
        say(f"{_WORDS[self.verb][1]} {self.name}: {nbytes}, {how}", self.node_id)


def say(text: str, node_id: str) -> None:
    """Shows a line of text on a node."""
    server = comfy.server()
    if server is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)
