"""Sends the state when the browsers' picture is out of date: a model moved, or a bar changed.

Between nodes that is seen at once. During a node and a move, and while other programs use the card,
a thread looks twice a second, so that no picture is more than a second old.
"""

from __future__ import annotations

import threading
import time

from .. import browser, comfy, progress
from ..guard import never_fails
from . import history, state

SHARE_OF_TIME = 0.05  # that looking between nodes may take
SECONDS_BETWEEN_LOOKS = 0.4
MOST_BETWEEN_LOOKS = 0.6

_changed = False
_is_whole = True  # whether the last state that was sent had everything
_last_sent: object = None
_next_look_at = 0.0
_lock = threading.Lock()  # one picture at a time, or an older one might come last
_watching = False
_watch_lock = threading.Lock()


def model_moved() -> None:
    """Notes that the picture is out of date; it is sent between nodes, not during a move."""
    global _changed
    _changed = True


@never_fails("send what changed to the browser", None)
def send_if_changed(*, quick: bool = False) -> None:
    """Sends the state if a model has moved, come or gone, or if a device's bar has changed.

    With `quick` as a thread does that only looks; what that leaves out is sent with the next whole
    state.
    """
    global _changed, _is_whole, _last_sent, _next_look_at
    with _lock:
        started = time.perf_counter()
        outline = state.outline()
        done = time.perf_counter()
        _next_look_at = done + (done - started) / SHARE_OF_TIME
        if _changed or outline != _last_sent or not (_is_whole or quick):
            _changed, _last_sent, _is_whole = False, outline, not quick
            snapshot = state.snapshot(quick=quick)
            _changed = _changed or bool(snapshot["moves"])  # they go on
            browser.send(browser.STATE, snapshot)


def send_if_due() -> None:
    """As `send_if_changed`, but seldom enough not to hold up many quick nodes."""
    if _changed or time.perf_counter() >= _next_look_at:
        send_if_changed()


def watch() -> None:
    """From now on the picture is kept true, for as long as a browser is connected; where ComfyUI
    does not say whether one is, as long as a prompt runs or something moves."""
    global _watching
    with _watch_lock:
        if _watching or not _is_wanted():
            return
        _watching = True
    threading.Thread(target=_watch, name="qmove panel", daemon=True).start()


def watch_move(move: progress.Move) -> None:
    """The same, as a move begins."""
    if move.state == "running":
        watch()


def _watch() -> None:
    global _watching
    cost = 0.0
    while True:
        time.sleep(min(max(SECONDS_BETWEEN_LOOKS, cost / SHARE_OF_TIME), MOST_BETWEEN_LOOKS))
        with _watch_lock:
            if not _is_wanted():
                _watching = False
                return
        started = time.perf_counter()
        send_if_changed(quick=True)
        cost = time.perf_counter() - started


def _is_wanted() -> bool:
    watched = comfy.has_browsers()
    return watched if watched is not None else history.is_running() or bool(progress.running())
