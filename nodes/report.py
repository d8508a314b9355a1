"""The node Memory Report."""

from __future__ import annotations

from typing import Any, ClassVar

from .any_type import ANY
from .host.panel import state
from .memory_picture import draw_picture, write_text
from .shown import shown


class QMoveReport:
    """Who holds what, where: as text and as a picture."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "report"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("report", "picture")
    SEARCH_ALIASES: ClassVar[list[str]] = [
        *("vram usage", "memory usage", "gpu memory", "free memory", "vram monitor"),
        *("who uses vram", "lowvram", "low vram"),
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "optional": {
                "after": (ANY, {"tooltip": "The report is made after this input arrives."})
            },
            "required": {},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """Never equal: memory changes although no input does. Only reports depend on this node."""
        return float("nan")

    def report(self, after: Any = None) -> dict[str, Any]:
        snapshot = state.snapshot()
        text = write_text(snapshot)
        return shown(text, (text, draw_picture(snapshot)))
