"""Shows each move in ComfyUI's bar, in the panel and on nodes of qmove; and cancels moves.

Another pack's node gets no text of ours: only the bar that ComfyUI itself draws on it.

A move inside a prompt is stopped by the user's interrupt, one that a button asked for by `cancel`.
Both raise in the callback of the core, which then rolls the move back.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from qmove_core.for_hosts import readable_bytes

from . import advice, browser, comfy, node_names
from .guard import is_interrupt, never_fails

SECONDS_BETWEEN_UPDATES = 0.1

_WORDS = {
    "park": ("Parking", "Parked"),
    "restore": ("Restoring", "Restored"),
    "wait": ("Waiting for other programs to free VRAM of", "Other programs have freed VRAM of"),
}

_staged_node: ContextVar[str | None] = ContextVar("qmove_staged_node", default=None)
_asked_for: ContextVar[bool] = ContextVar("qmove_asked_for", default=False)
_on_own_node: ContextVar[bool] = ContextVar("qmove_on_own_node", default=False)
_numbers = itertools.count(1)
_running: dict[int, Move] = {}
_followers: list[Callable[[Move], None]] = []
_lock = threading.Lock()


def on_change(follower: Callable[[Move], None]) -> None:
    """Registers `follower`, called as each move begins and when it has ended, in its thread."""
    if follower not in _followers:
        _followers.append(follower)


class Cancelled(BaseException):
    """A move that a button asked for was cancelled.

    Like asyncio's it is not an Exception: it passes through ComfyUI's model management, which must
    not take it for a failure and go on.
    """


class NoSuchMove(ValueError):
    """The move to cancel is not running, or cannot be cancelled."""


@contextmanager
def for_node(node_id: str) -> Iterator[None]:
    """Inside, moves show on this node: it is about to run, and ComfyUI does not name it yet."""
    token = _staged_node.set(node_id)
    try:
        yield
    finally:
        _staged_node.reset(token)


@contextmanager
def on_own_node() -> Iterator[None]:
    """Inside, a node of qmove runs: its moves show as text on it."""
    token = _on_own_node.set(True)
    try:
        yield
    finally:
        _on_own_node.reset(token)


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
    """Shows one move of `nbytes` while it runs; its `report` is the callback for the core.

    Args:
        verb: "park" or "restore"; or "wait", for what no move of ours frees.
        name: of the model; or of the device that is waited for.
        model: its number; or 0.
    """
    move = Move(verb, name, model, nbytes)
    with _lock:
        _running[move.number] = move
    move.begin()
    try:
        yield move
        move.state = "done"
    except BaseException as error:
        stopped = isinstance(error, Cancelled) or is_interrupt(error)
        move.state = "cancelled" if stopped else "failed"
        if not stopped:
            move.reason, move.advice = advice.for_people(error), advice.way_out(error)
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
    """Stops a move; the model stays where it was.

    Returns:
        What is cancelled: the "move", or the "prompt" that needs it.

    Raises:
        NoSuchMove: it has ended, or ComfyUI needs it done.
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
        node_id: the node it shows on, None outside of a prompt.
        done, total: bytes copied, and to copy; before the first report, the bytes of the model.
        cancels: what `cancel` stops: the "move", the "prompt" that needs it, or None for nothing.
        state: "running", "done", "cancelled" or "failed".
        reason, advice: why it failed, in words for people, and what helps (`advice.way_out`).
        result: what the core's call returned.
    """

    def __init__(self, verb: str, name: str, model: int, nbytes: int) -> None:
        self.number = next(_numbers)
        self.verb, self.name, self.model = verb, name, model
        self.node_id = _staged_node.get() or comfy.running_node()
        self._stage = node_names.of(self.node_id)
        self.done, self.total = 0, nbytes
        self.state = "running"
        self.reason = self.advice = ""
        self.result: Any = None
        # ComfyUI unloads models outside of prompts too (POST /free). An interrupt that was left
        # over must not stop that: there it would end ComfyUI's worker.
        self._host = comfy.model_management() if self.node_id is not None else None
        self.cancels = "prompt" if self._host else "move" if _asked_for.get() else None
        self._is_on_own_node = _on_own_node.get() and self.node_id == comfy.running_node()
        self._cancelled = False
        self.began = time.monotonic()
        self._seconds: float | None = None
        self._next_update = 0.0
        bar_class: Any = comfy.progress_bar_class() if self._host else None
        self._bar = bar_class(1, node_id=self.node_id) if bar_class is not None else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began if self._seconds is None else self._seconds

    def cancel(self) -> None:
        if self._host is not None:
            self._host.interrupt_current_processing(True)
        else:
            self._cancelled = True

    def report(self, done: int, total: int) -> None:
        """Takes the progress of the core, in bytes.

        Raises:
            InterruptProcessingException (ComfyUI's) or Cancelled, upon which the core rolls back.
        """
        self.done, self.total = done, total
        if self._host is not None:
            self._host.throw_exception_if_processing_interrupted()
        if self._cancelled:
            raise Cancelled(f"{_WORDS[self.verb][0]} {self.name} was cancelled.")
        now = time.monotonic()
        if now < self._next_update and done < total:
            return
        self._next_update = now + SECONDS_BETWEEN_UPDATES
        self._show()

    @never_fails("show the progress of a move", None)
    def _show(self) -> None:
        self.send()
        if self._bar is not None:
            self._bar.update_absolute(self.done, self.total)  # it too raises the user's interrupt
        if self.node_id is not None and self._is_on_own_node:
            how_far = f"{readable_bytes(self.done)} of {readable_bytes(self.total)}"
            said = f"{_WORDS[self.verb][0]} {self.name}: {how_far}"
            browser.show_on_own_node(said, self.node_id)

    @never_fails("show that a move begins", None)
    def begin(self) -> None:
        """Shows that it has begun."""
        self.send()
        for follower in _followers:
            follower(self)

    @never_fails("show how a move ended", None)
    def end(self) -> None:
        """Shows how it ended."""
        self._seconds = self.seconds
        self.send()
        for follower in _followers:
            follower(self)

    def to_dict(self) -> dict[str, Any]:
        seconds, running = self.seconds, self.state == "running"
        moves = self.done and seconds > 0 and self.verb != "wait"
        speed = self.done / seconds if moves else None
        left = round((self.total - self.done) / speed, 3) if speed and running else None
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
            "seconds_left": left,
            "node": self.node_id,
            "stage": None if self._stage is None else self._stage.to_dict(),
            "reason": self.reason,
            "advice": self.advice,
            "cancel": self.cancels if running else None,
            "state": self.state,
        }

    @never_fails("send the progress of a move to the browser", None)
    def send(self) -> None:
        browser.send(browser.MOVE, self.to_dict())
