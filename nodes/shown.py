"""A node's result together with the text that ComfyUI shows on the node."""

from __future__ import annotations

import logging
from typing import Any

from .host import browser, comfy, meter

log = logging.getLogger("qmove")


def shown(report: str, result: tuple[Any, ...], *, succeeded: bool = True) -> dict[str, Any]:
    """Logs the report, as a warning where the node did less than was asked, and shows it on the
    running node."""
    node_id = comfy.running_node()
    if node_id is not None:
        browser.show_on_own_node(report, node_id)
    log.log(logging.INFO if succeeded else logging.WARNING, "%s", report)
    return {"ui": {"text": [report]}, "result": result}


def in_gib(nbytes: int) -> float:
    """For an output that is a number."""
    return nbytes / meter.GIB
