"""The node Park Model."""

from __future__ import annotations

from typing import Any, ClassVar

from .any_type import ANY
from .host import meter
from .host.stages import requests
from .shown import in_gib, shown


class QMovePark:
    """Unloads a model from VRAM to RAM, bit for bit. It comes back by itself when it is used."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "park"
    OUTPUT_NODE = True  # it does its work also when nothing is connected behind it
    RETURN_TYPES = (ANY, ANY, "STRING", "FLOAT", "FLOAT")
    RETURN_NAMES = ("model", "after", "report", "freed_gib", "free_gib")
    SEARCH_ALIASES: ClassVar[list[str]] = [
        *("unload model", "unload to ram", "offload", "move to cpu", "move to ram", "sleep"),
        *("free vram", "free memory", "free gpu memory", "out of memory", "oom"),
        *("lowvram", "low vram", "swap", "vram"),
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        model = (
            "Any model: a pipeline, a transformers model, a dict of models, a MODEL, CLIP or VAE."
        )
        after = "An output of the stage that used the model. The model is parked after that stage."
        return {
            "required": {"model": (ANY, {"tooltip": model})},
            "optional": {"after": (ANY, {"tooltip": after})},
        }

    def park(self, model: Any, after: Any = None) -> dict[str, Any]:
        parking = requests.parking_of(model)
        freed, free = sum(parking.freed.values()), meter.least_free(parking.freed)
        return shown(parking.report, (model, after, parking.report, in_gib(freed), in_gib(free)))
