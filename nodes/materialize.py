"""The node Materialize Model."""

from __future__ import annotations

from typing import Any, ClassVar

from qmove_core import for_hosts

from .any_type import ANY
from .host.stages import requests
from .shown import shown


class QMoveMaterialize:
    """Gives every meta tensor of a dispatched model its real data, so that the model can be moved and parked."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "materialize"
    RETURN_TYPES = (ANY, "STRING")
    RETURN_NAMES = ("model", "report")
    SEARCH_ALIASES: ClassVar[list[str]] = ["meta tensor", "device_map", "accelerate"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": (ANY, {"tooltip": "A model that was loaded with a device_map."}),
                "target_device": (for_hosts.known_devices(), {"default": "cpu", "tooltip": "Where the data goes. It must fit there."}),
            }
        }  # fmt: skip

    def materialize(self, model: Any, target_device: str) -> dict[str, Any]:
        report = requests.materialize_value(model, target_device)
        return shown(report, (model, report))
