"""The node Free VRAM."""

from __future__ import annotations

from typing import Any, ClassVar

from .any_type import ANY
from .host import meter
from .host.stages import making_room
from .shown import in_gib, shown


class QMoveFreeVRAM:
    """Unloads idle models to RAM, the least useful first, until so much VRAM is free."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "free"
    OUTPUT_NODE = True
    RETURN_TYPES = (ANY, "STRING", "FLOAT", "FLOAT")
    RETURN_NAMES = ("after", "report", "freed_gib", "free_gib")
    SEARCH_ALIASES: ClassVar[list[str]] = [
        *("unload models", "unload all models", "purge vram", "clean vram", "clear vram"),
        *("free memory", "free gpu memory", "empty cache", "out of memory", "oom"),
        *("lowvram", "low vram", "swap models", "offload", "vram"),
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        wanted = {
            "default": meter.usual_gib(),
            "min": 0.1,
            "max": 1024.0,
            "step": 0.1,
            "tooltip": "So many GiB are free on each GPU afterwards. The default is half of it.",
        }
        return {
            "required": {"gib": ("FLOAT", wanted)},
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
        room = making_room.free(int(gib * meter.GIB), wait=wait)
        return shown(
            room.report,
            (after, room.report, in_gib(sum(room.freed.values())), in_gib(meter.least_free())),
            succeeded=room.is_enough,
        )
