"""Sends to the browsers over ComfyUI's websocket."""

from __future__ import annotations

from typing import Any

from . import comfy

STATE = "qmove.state"
SETTINGS = "qmove.settings"
MOVE = "qmove.move"
HISTORY = "qmove.history"
RESULT = "qmove.result"
FAILURE = "qmove.failure"


def send(event: str, data: dict[str, Any]) -> None:
    """Sends to all browsers: models and settings belong to the process, not to one of them."""
    server = comfy.server()
    if server is not None:
        server.send_sync(event, data)


def show_on_own_node(text: str, node_id: str) -> None:
    """Shows a line of text on a node of qmove, in the browser whose prompt runs.

    Never on another pack's node: such text makes a node grow, may be saved with the workflow, and
    is not about that node.
    """
    server = comfy.server()
    if server is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)
