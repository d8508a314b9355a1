"""A node's result together with the text that ComfyUI shows on the node."""

from __future__ import annotations

import logging
from typing import Any

from .host import browser, comfy

log = logging.getLogger("qmove")


def shown(report: str, result: tuple[Any, ...]) -> dict[str, Any]:
    """Logs the report and shows it on the running node."""
    node_id = comfy.running_node()
    if node_id is not None:
        browser.show_on_node(report, node_id)
    log.info("%s", report)
    return {"ui": {"text": [report]}, "result": result}
