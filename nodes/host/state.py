"""What qmove holds now, as plain data: for the report node, for the browser, and for people who ask the route."""

from __future__ import annotations

from typing import Any

import psutil
import torch

import qmove_core as qmove
from qmove_core import registry

from . import comfy, residency, settings
from .adopted import Adopted, adopted_models
from .entry import Entry


def snapshot() -> dict[str, Any]:
    """All adopted models, the devices, the host's memory, and what was done since the start. All sizes are bytes."""
    with registry.lock:
        stats = qmove.stats()
        memory = psutil.virtual_memory()
        return {
            "settings": settings.current(),
            "models": [_model(adopted) for adopted in adopted_models()],
            "comfyui_models": _hosts_own(),
            "devices": [_device(device) for device in residency.devices()],
            "ram": {"total": memory.total, "free": memory.available, "parked": stats.arena_bytes},
            "done": {
                "parks": stats.parks,
                "restores": stats.restores,
                "moves": stats.moves,
                "copied_bytes": stats.copied_bytes,
            },
        }


def _model(adopted: Adopted) -> dict[str, Any]:
    resident, parked = adopted.resident, adopted.parked
    return {
        "id": adopted.number,
        "name": adopted.name,
        "state": "parked" if parked and not resident else "resident" if not parked else "partly parked",
        "resident": {str(device): nbytes for device, nbytes in resident.items()},
        "parked": {str(device): nbytes for device, nbytes in parked.items()},
    }


def _hosts_own() -> list[dict[str, Any]]:
    host = comfy.model_management()
    entries = [loaded.model for loaded in host.current_loaded_models] if host is not None else []
    return [
        {"name": type(entry.model).__name__, "resident": {str(entry.load_device): int(entry.loaded_size())}}
        for entry in entries
        if entry is not None and not isinstance(entry, Entry)
    ]


def _device(device: torch.device) -> dict[str, Any]:
    module = torch.get_device_module(device)
    total = module.mem_get_info(device)[1] if hasattr(module, "mem_get_info") else None
    return {"name": str(device), "total": total, "free": residency.free_bytes(device)}
