"""What qmove holds now, as plain data: for the report node, for the browser, and for the route."""

from __future__ import annotations

from collections import Counter
from typing import Any

import psutil
import torch

import qmove_core as qmove
from qmove_core import for_hosts

from .. import meter, progress, settings
from ..models import holders, node_models, pins, residency
from ..models.adopted import Adopted, adopted_models
from ..pool import provider
from ..pool.keeping import pool
from . import version

SECONDS_BETWEEN_TRIES = 0.05
SAME = 0.1  # of the smaller of two models: what they must have in common to be told


_last: tuple[list[dict[str, Any]], qmove.Stats] | None = None  # models and figures when none moved


def snapshot() -> dict[str, Any]:
    """All adopted models, the devices, RAM, and what was done since the start. Sizes are in bytes.

    It does not wait for a move of another thread: then all models are as they were before it, and
    those that move are busy.
    """
    models, stats = _look()
    moves = progress.running()
    busy = {move["model"]: move["verb"] for move in moves}
    memory = psutil.virtual_memory()
    return {
        **version.about(),
        "settings": settings.current(),
        "models": [
            model | {"state": "busy", "busy": busy[model["id"]]} if model["id"] in busy else model
            for model in models
        ],
        "comfyui_models": [
            {
                "name": type(entry.model).__name__,
                "resident": {str(entry.load_device): int(entry.loaded_size())},
            }
            for entry in residency.hosts_own_entries()
        ],
        "devices": [_device(device) for device in meter.devices()],
        "ram": {
            "total": memory.total,
            "free": memory.available,
            "parked": sum(stats.parked_bytes.values()),
            "mirrors": stats.mirror_bytes,
            "spare": stats.spare_bytes,
            "shared": stats.shared_bytes,
        },
        "pool": pool.figures() if provider.is_installed() else None,
        "done": {
            "parks": stats.parks,
            "restores": stats.restores,
            "moves": stats.moves,
            "copied_bytes": stats.copied_bytes,
        },
        "moves": moves,
        "nodes": node_models.nodes_with_models(),
        "pins": pins.choices(),
    }


def outline() -> tuple[object, ...]:
    """Differs when a browser would show something else: a model came, went, was used or pinned; a
    bar.

    It is cheap to make.
    """
    readings = [meter.read(device) for device in meter.devices()]
    bars = [200 * r.used // r.total for r in readings if r is not None and r.total]
    models = [(m.number, m.last_used, pins.choice_of(m)) for m in adopted_models()]
    return tuple(models), tuple(bars), (pool.hits, pool.misses, pool.count)


def _look() -> tuple[list[dict[str, Any]], qmove.Stats]:
    global _last
    # A thread that only looks holds the lock for a moment; one that moves, until it has moved.
    while not for_hosts.lock.acquire(timeout=SECONDS_BETWEEN_TRIES):
        if _last is not None and progress.running():
            return _last
    try:
        _last = _models(), qmove.stats()
        return _last
    finally:
        for_hosts.lock.release()


def _models() -> list[dict[str, Any]]:
    """The adopted models, each with those that have the same weights, or a good part of them, as
    far as digests tell that were taken anyway."""
    adopted = adopted_models()
    models, weights = [_model(one) for one in adopted], [one.weights() for one in adopted]
    for model, mine in zip(models, weights, strict=True):
        model["same"] = []
        for other, others in zip(models, weights, strict=True):
            common = mine & others if mine and other is not model else Counter()
            nbytes = sum(size * count for (_digest, size), count in common.items())
            if nbytes and nbytes >= SAME * min(model["nbytes"], other["nbytes"]):
                model["same"].append({"id": other["id"], "name": other["name"], "nbytes": nbytes})
    return models


def _model(adopted: Adopted) -> dict[str, Any]:
    resident = {str(device): nbytes for device, nbytes in adopted.resident.items()}
    parked = {str(device): nbytes for device, nbytes in adopted.parked.items()}
    description = adopted.description
    if parked:
        state = "partly parked" if resident else "parked"
    elif resident:
        state = "resident"
    else:
        state = "on disk" if description.on_disk else "in RAM"
    elsewhere = description.on_disk + description.offloaded
    return {
        "id": adopted.number,
        "name": adopted.name,
        "place": adopted.place,
        "kind": description.kind,
        "nbytes": sum(resident.values()) + sum(parked.values()) + elsewhere,
        "state": state,
        "busy": None,
        "resident": resident,
        "parked": parked,
        "on_disk": description.on_disk,
        "lost": adopted.lost,
        "home": list(dict.fromkeys([*resident, *parked])),
        "last_used": adopted.last_used_at,
        "pin": pins.choice_of(adopted),
    }


def _device(device: torch.device) -> dict[str, Any]:
    module, title = torch.get_device_module(device), str(device)
    if hasattr(module, "get_device_name"):
        title = str(module.get_device_name(device))
    if for_hosts.has_context(device):
        free = meter.free_bytes(device)
    else:
        memory = for_hosts.memory_without_context(device)
        free = None if memory is None else memory.free
    return {
        "name": str(device),
        "title": title,
        "total": for_hosts.total_memory(device),
        "free": free,
        "others": [
            {"name": holder.name, "nbytes": holder.nbytes, "kind": holder.kind}
            for holder in holders.others_on(device)
        ],
    }
