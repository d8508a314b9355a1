"""What qmove holds now, as plain data: for the report node, for the browser, and for people who ask the route."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

import qmove_core as qmove
from qmove_core import homes

from .. import comfy, meter, progress, settings
from ..models import node_models, residency
from ..models.adopted import Adopted, adopted_models
from ..models.entry import Entry
from . import version


@dataclass
class _Seen:
    """What was seen when no model moved."""

    models: list[dict[str, Any]] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)


SECONDS_BETWEEN_TRIES = 0.05

_last: _Seen | None = None


def snapshot() -> dict[str, Any]:
    """All adopted models, the devices, the host's memory, and what was done since the start. All sizes are bytes.

    While another thread moves a model nobody waits for it: the models are told as they were before, and those that move as busy.
    """
    seen = _look()
    moves = progress.running()
    busy = {move["model"]: move["verb"] for move in moves}
    memory = psutil.virtual_memory()
    return {
        **version.about(),
        "settings": settings.current(),
        "models": [_with_move(model, busy.get(model["id"])) for model in seen.models],
        "comfyui_models": _hosts_own(),
        "devices": [_device(device) for device in residency.devices()],
        "ram": {"total": memory.total, "free": memory.available, **seen.held},
        "done": dict(seen.done),
        "moves": moves,
        "nodes": node_models.nodes_with_models(),
    }


def outline() -> tuple[object, ...]:
    """Cheap to make, and another one when a browser would show something else: a model came, was used or went, a bar changed."""
    readings = [meter.read(device) for device in residency.devices()]
    bars = [
        200 * reading.used // reading.total
        for reading in readings
        if reading is not None and reading.total
    ]
    return tuple((adopted.number, adopted.last_used) for adopted in adopted_models()), tuple(bars)


def _look() -> _Seen:
    global _last
    while not homes.lock.acquire(
        timeout=SECONDS_BETWEEN_TRIES
    ):  # whoever only looks has it but for a moment
        if _last is not None and progress.running():
            return _last
    try:
        stats = qmove.stats()
        _last = _Seen(
            models=[_model(adopted) for adopted in adopted_models()],
            held={
                "parked": sum(stats.parked_bytes.values()),
                "mirrors": stats.mirror_bytes,
                "spare": stats.spare_bytes,
            },
            done={
                "parks": stats.parks,
                "restores": stats.restores,
                "moves": stats.moves,
                "copied_bytes": stats.copied_bytes,
            },
        )
        return _last
    finally:
        homes.lock.release()


def _model(adopted: Adopted) -> dict[str, Any]:
    resident, parked, description = adopted.resident, adopted.parked, adopted.description
    homes = dict.fromkeys([*resident, *parked])
    return {
        "id": adopted.number,
        "name": adopted.name,
        "kind": description.kind,
        "nbytes": sum(resident.values())
        + sum(parked.values())
        + description.on_disk
        + description.offloaded,
        "state": _state(adopted),
        "busy": None,
        "resident": {str(device): nbytes for device, nbytes in resident.items()},
        "parked": {str(device): nbytes for device, nbytes in parked.items()},
        "on_disk": description.on_disk,
        "home": [str(device) for device in homes],
        "last_used": adopted.last_used_at,
    }


def _state(adopted: Adopted) -> str:
    if adopted.parked:
        return "partly parked" if adopted.resident else "parked"
    if adopted.resident:
        return "resident"
    return "on disk" if adopted.description.on_disk else "in RAM"


def _with_move(model: dict[str, Any], verb: str | None) -> dict[str, Any]:
    return model if verb is None else model | {"state": "busy", "busy": verb}


def _hosts_own() -> list[dict[str, Any]]:
    host = comfy.model_management()
    entries = [loaded.model for loaded in host.current_loaded_models] if host is not None else []
    return [
        {
            "name": type(entry.model).__name__,
            "resident": {str(entry.load_device): int(entry.loaded_size())},
        }
        for entry in entries
        if entry is not None and not isinstance(entry, Entry)
    ]


def _device(device: torch.device) -> dict[str, Any]:
    return {
        "name": str(device),
        "title": _title(device),
        "total": _total(device),
        "free": residency.free_bytes(device),
    }


def _total(device: torch.device) -> int | None:
    module = torch.get_device_module(device)
    return module.mem_get_info(device)[1] if hasattr(module, "mem_get_info") else None


def _title(device: torch.device) -> str:
    module = torch.get_device_module(device)
    return (
        str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)
    )
