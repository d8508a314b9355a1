"""The node Pin Model."""

from __future__ import annotations

from typing import Any, ClassVar

from .any_type import ANY
from .host.models import pins
from .host.stages import pinning
from .shown import shown

KEEP_ON = "keep on "


class QMovePin:
    """Keeps a model where it is: it is not parked until it is unpinned, also in later prompts."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "pin"
    OUTPUT_NODE = True  # it does its work also when nothing is connected behind it
    RETURN_TYPES = (ANY, "STRING")
    RETURN_NAMES = ("model", "report")
    SEARCH_ALIASES: ClassVar[list[str]] = [
        *("keep in vram", "keep loaded", "never unload", "do not offload", "lock model"),
        *("leave alone", "lowvram", "low vram"),
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        known = (pins.PIN, pins.UNPIN, pins.FORGET)
        choices = [c if c in known else KEEP_ON + c for c in pins.choices()]
        tooltip = (
            "pin: it is never parked. keep on: it goes to that GPU and stays there. "
            "unpin: it can be parked again. forget: qmove leaves it alone."
        )
        return {
            "required": {
                "model": (ANY, {"tooltip": "Any model, parked or not."}),
                "choice": (choices, {"default": pins.PIN, "tooltip": tooltip}),
            }
        }

    def pin(self, model: Any, choice: str) -> dict[str, Any]:
        report = pinning.pin_value(model, choice.removeprefix(KEEP_ON))
        return shown(report, (model, report))
