"""The node Free VRAM."""

from __future__ import annotations

from typing import Any, ClassVar

from .any_type import ANY
from .host.stages import requests
from .shown import shown


class QMoveFreeVRAM:
    """Parks models, the least useful first, until this much VRAM is free."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "free"
    OUTPUT_NODE = True
    RETURN_TYPES = (ANY, "STRING")
    RETURN_NAMES = ("after", "report")
    SEARCH_ALIASES: ClassVar[list[str]] = ["unload models", "purge vram", "clean vram"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        gib = {
            "default": 8.0,
            "min": 0.1,
            "max": 1024.0,
            "step": 0.1,
            "tooltip": "GiB that should be free on each GPU.",
        }
        return {
            "required": {"gib": ("FLOAT", gib)},
            "optional": {
                "wait": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Where parking is not enough, waits until other programs have "
                        "freed the rest.",
                    },
                ),
                "after": (
                    ANY,
                    {"tooltip": "The node runs after this input, which is passed through."},
                ),
            },
        }

    def free(self, gib: float, wait: bool = False, after: Any = None) -> dict[str, Any]:
        report = requests.free_vram(int(gib * 2**30), wait=wait)
        return shown(report, (after, report))
