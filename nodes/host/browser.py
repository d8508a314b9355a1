"""Sends to the browsers over ComfyUI's websocket."""

from __future__ import annotations

from typing import Any

from . import comfy

STATE, SETTINGS, MOVE, HISTORY, RESULT = (
    "qmove.state",
    "qmove.settings",
    "qmove.move",
    "qmove.history",
    "qmove.result",
)


def send(event: str, data: dict[str, Any]) -> None:
    """Sends to all browsers: models and settings belong to the process, not to one of them."""
    server = comfy.server()
    if server is not None:
        server.send_sync(event, data)
