"""The node Restore Model."""

from __future__ import annotations

from typing import Any, ClassVar

from qmove_core import for_hosts

from .any_type import ANY
from .host.stages import requests
from .shown import shown


class QMoveRestore:
    """Loads a parked model back into VRAM. A model that is used comes back by itself."""

    CATEGORY = "qmove"
    DESCRIPTION = __doc__
    FUNCTION = "restore"
    RETURN_TYPES = (ANY, "STRING")
    RETURN_NAMES = ("model", "report")
    SEARCH_ALIASES: ClassVar[list[str]] = [
        *("load back", "reload model", "load to gpu", "move to gpu", "unpark", "wake up"),
        *("swap", "lowvram", "low vram", "wait for vram", "vram"),
    ]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        places = [requests.HOME, *for_hosts.known_devices()]
        return {
            "required": {
                "model": (ANY, {"tooltip": "Any model, parked or not."}),
                "device": (
                    places,
                    {"default": requests.HOME, "tooltip": "home: where it came from."},
                ),
            },
            "optional": {
                "wait_for_gib": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 1024.0,
                        "step": 0.1,
                        "tooltip": "First waits until so many GiB of the GPU are free, as other "
                        "programs let go of them. 0: does not wait.",
                    },
                )
            },
        }

    def restore(self, model: Any, device: str, wait_for_gib: float = 0.0) -> dict[str, Any]:
        report = requests.restore_value(model, device, int(wait_for_gib * 2**30))
        return shown(report, (model, report))
