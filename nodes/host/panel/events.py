"""Sends the state when the browsers' picture is out of date: a model moved, or a bar changed."""

from __future__ import annotations

import time

from .. import browser
from ..guard import never_fails
from . import state

SHARE_OF_TIME = 0.05  # that looking between nodes may take

_changed = False
_last_sent: object = None
_next_look_at = 0.0


def model_moved() -> None:
    """Notes that the picture is out of date; it is sent between nodes, not during a move."""
    global _changed
    _changed = True


@never_fails("send what changed to the browser", None)
def send_if_changed() -> None:
    """Sends the state if a model has moved, come or gone, or if a device's bar has changed."""
    global _changed, _last_sent, _next_look_at
    started = time.perf_counter()
    outline = state.outline()
    done = time.perf_counter()
    _next_look_at = done + (done - started) / SHARE_OF_TIME
    if _changed or outline != _last_sent:
        _changed, _last_sent = False, outline
        snapshot = state.snapshot()
        _changed = _changed or bool(snapshot["moves"])  # its models are as they were before these
        browser.send(browser.STATE, snapshot)


def send_if_due() -> None:
    """As `send_if_changed`, but seldom enough not to hold up many quick nodes."""
    if _changed or time.perf_counter() >= _next_look_at:
        send_if_changed()
