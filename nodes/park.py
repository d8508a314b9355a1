"""The node Park Model."""

from __future__ import annotations

from typing import Any, ClassVar

from .any_type import ANY
from .host.stages import requests
from .shown import shown


class QMovePark:
    """Moves a model out of VRAM into CPU RAM, bit for bit. It wakes by itself when it is used."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "park"
    OUTPUT_NODE = True  # it does its work also when nothing is connected behind it
    RETURN_TYPES = (ANY, ANY, "STRING")
    RETURN_NAMES = ("model", "after", "report")
    SEARCH_ALIASES: ClassVar[list[str]] = ["unload", "offload", "free vram", "move to cpu"]

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
        report = requests.park_value(model)
        return shown(report, (model, after, report))
