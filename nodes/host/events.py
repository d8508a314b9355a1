"""Tells the browser, over ComfyUI's websocket, when a model has moved or a setting has changed."""

from __future__ import annotations

from typing import Any

from . import comfy, state
from .guard import never_fails

STATE, SETTINGS = "qmove.state", "qmove.settings"

_changed = False


def model_moved() -> None:
    """Notes that the browsers' picture is out of date; it is sent between nodes, not in the middle of a move."""
    global _changed
    _changed = True


@never_fails("tell the browser what changed", None)
def send_if_changed() -> None:
    global _changed
    if _changed:
        _changed = False
        send(STATE, state.snapshot())


def send(event: str, data: dict[str, Any]) -> None:
    """Sends to all browsers: models and settings belong to the process, not to one of them."""
    server = comfy.server()
    if server is not None:
        server.send_sync(event, data)
