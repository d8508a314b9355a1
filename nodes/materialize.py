"""The node Materialize Model."""

from __future__ import annotations

from typing import Any, ClassVar

from qmove_core import for_hosts

from .any_type import ANY
from .host.stages import requests
from .shown import shown


class QMoveMaterialize:
    """Gives the meta tensors of a dispatched model their data, so that it can be parked."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "materialize"
    RETURN_TYPES = (ANY, "STRING")
    RETURN_NAMES = ("model", "report")
    SEARCH_ALIASES: ClassVar[list[str]] = [
        *("meta tensor", "device_map", "accelerate", "offload folder", "load into ram"),
        *("lowvram", "low vram", "no data", "swap"),
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        target = {"default": "cpu", "tooltip": "Where the data goes. It must fit there."}
        return {
            "required": {
                "model": (ANY, {"tooltip": "A model that was loaded with a device_map."}),
                "target_device": (for_hosts.known_devices(), target),
            }
        }

    def materialize(self, model: Any, target_device: str) -> dict[str, Any]:
        report = requests.materialize_value(model, target_device)
        return shown(report, (model, report))
