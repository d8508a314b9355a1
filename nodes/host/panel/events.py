"""Tells the browsers when what they show is out of date: a model has moved, come or gone, or a bar has changed."""

from __future__ import annotations

import time

from .. import browser
from ..guard import never_fails
from . import state

SHARE_OF_TIME = 0.05  # that looking between nodes may take

_changed = False
_last_sent: object = None
_looks_again_at = 0.0


def model_moved() -> None:
    """Notes that the browsers' picture is out of date; it is sent between nodes, not in the middle of a move."""
    global _changed
    _changed = True


@never_fails("tell the browser what changed", None)
def send_if_changed() -> None:
    """Sends the state if a model has moved, come or gone, or if a device's memory has changed so that its bar shows it."""
    global _changed, _last_sent, _looks_again_at
    started = time.perf_counter()
    outline = state.outline()
    done = time.perf_counter()
    _looks_again_at = done + (done - started) / SHARE_OF_TIME
    if _changed or outline != _last_sent:
        _changed, _last_sent = False, outline
        snapshot = state.snapshot()
        _changed = _changed or bool(
            snapshot["moves"]
        )  # then the models are told as they were before
        browser.send(browser.STATE, snapshot)


def send_if_due() -> None:
    """As `send_if_changed`, between nodes: many quick ones are not held up by looking at the devices after each."""
    if _changed or time.perf_counter() >= _looks_again_at:
        send_if_changed()
