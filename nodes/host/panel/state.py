"""What qmove holds now, as plain data: for the report node, for the browser, and for the route."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from typing import Any

import psutil
import torch
from torch.utils.weak import WeakIdKeyDictionary

import qmove_core as qmove
from qmove_core import for_hosts

from .. import meter, progress, settings
from ..contract import HostEntry
from ..models import holders, names, node_models, pins, residency
from ..models.adopted import Adopted, adopted_models
from ..models.loose_tensors import LooseTensors
from ..pool import provider
from ..pool.keeping import pool
from . import failures, version

SECONDS_BETWEEN_TRIES = 0.05
SAME = 0.1  # of the smaller of two models: what they must have in common to be told


_last: tuple[list[dict[str, Any]], qmove.Stats] | None = None  # models and figures when none moved
_numbers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # ComfyUI's own model -> its id here
_next_number = itertools.count(1)


def snapshot(*, quick: bool = False) -> dict[str, Any]:
    """All models, the devices, RAM, and what was done since the start. Sizes are in bytes.

    It does not wait for a move of another thread: then it says where the bytes are at this moment,
    and the models that move are busy. With `quick` what takes longer to find out (which models
    have the same weights, whose bytes are gone) is as it was at the last look.
    """
    models, stats = _look_quickly() if quick else _look()
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
        "comfyui_models": [_hosts_own(entry) for entry in residency.hosts_own_entries()],
        "devices": [_device(device) for device in meter.devices()],
        "ram": {
            "total": memory.total,
            "free": memory.available,
            "parked": sum(for_hosts.parked_bytes().values()),
            "mirrors": stats.mirror_bytes if stats is not None else 0,
            "spare": stats.spare_bytes if stats is not None else 0,
            "shared": stats.shared_bytes if stats is not None else 0,
        },
        "pool": pool.figures() if provider.is_installed() else None,
        "done": {
            "parks": stats.parks if stats is not None else 0,
            "restores": stats.restores if stats is not None else 0,
            "moves": stats.moves if stats is not None else 0,
            "copied_bytes": stats.copied_bytes if stats is not None else 0,
        },
        "moves": moves,
        "failures": failures.of_last_run(),
        "nodes": node_models.nodes_with_models(),
        "menus": node_models.menus(),
        "pins": pins.choices(),
    }


def outline() -> tuple[object, ...]:
    """Differs when a browser would show something else: a model came, went, moved, was used or
    pinned; a bar.

    It is cheap to make.
    """
    readings = [meter.read(device) for device in meter.devices()]
    bars = [(r.used >> 20, r.allocated >> 20) for r in readings if r is not None]
    models = [(m.number, m.last_used, pins.choice_of(m)) for m in adopted_models()]
    own = [(id(e.model), int(e.loaded_size()) >> 20) for e in residency.hosts_own_entries()]
    parked = tuple(for_hosts.parked_bytes().items())
    return tuple(models), tuple(own), parked, tuple(bars), (pool.hits, pool.misses, pool.count)


def _look() -> tuple[list[dict[str, Any]], qmove.Stats | None]:
    global _last
    # A thread that only looks holds the lock for a moment; one that moves, until it has moved.
    while not for_hosts.lock.acquire(timeout=SECONDS_BETWEEN_TRIES):
        if progress.running():
            return _look_quickly()
    try:
        _last = _models(), qmove.stats()
        return _last
    finally:
        for_hosts.lock.release()


def _look_quickly() -> tuple[list[dict[str, Any]], qmove.Stats | None]:
    """Where the bytes are, without the lock that another thread holds while it moves some."""
    known, stats = _last if _last is not None else ([], None)
    before = {model["id"]: model for model in known}
    models = []
    for adopted in adopted_models():
        now = _model(adopted, lost=before.get(adopted.number, {}).get("lost", []))
        models.append(now | {"same": before.get(adopted.number, {}).get("same", [])})
    return models, stats


def _models() -> list[dict[str, Any]]:
    """The adopted models, each with those that have the same weights, or a good part of them, as
    far as digests tell that were taken anyway."""
    adopted = adopted_models()
    models = [_model(one, lost=one.lost) for one in adopted]
    weights = [one.weights() for one in adopted]
    for model, mine in zip(models, weights, strict=True):
        model["same"] = []
        for other, others in zip(models, weights, strict=True):
            common = mine & others if mine and other is not model else Counter()
            nbytes = sum(size * count for (_digest, size), count in common.items())
            if nbytes and nbytes >= SAME * min(model["nbytes"], other["nbytes"]):
                model["same"].append({"id": other["id"], "name": other["name"], "nbytes": nbytes})
    return models


def _model(adopted: Adopted, lost: list[str]) -> dict[str, Any]:
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
        "lost": lost,
        "home": list(dict.fromkeys([*resident, *parked])),
        "last_used": adopted.last_used_at,
        "pin": pins.choice_of(adopted),
    } | _class_of(adopted.model, adopted.name)


def _class_of(model: object, name: str) -> dict[str, str]:
    """The class of a model, where its user calls it something else."""
    own = type(model).__name__
    return {} if own == name or isinstance(model, LooseTensors) else {"class": own}


def _hosts_own(entry: HostEntry) -> dict[str, Any]:
    """A model that ComfyUI moves itself."""
    if entry.model not in _numbers:
        _numbers[entry.model] = next(_next_number)
    loaded, device = int(entry.loaded_size()), str(entry.load_device)
    return {
        "id": _numbers[entry.model],
        "name": names.of(entry.model),
        "nbytes": max(loaded, int(entry.model_size())),
        "resident": {device: loaded},
        "device": device,
        "dynamic": residency.is_dynamic(entry),
        "pin": pins.choice_of(entry),
    } | _class_of(entry.model, names.of(entry.model))


def hosts_own_of(numbers: Collection[int]) -> list[HostEntry]:
    """ComfyUI's own models with these ids, as far as they are still loaded."""
    return [
        entry
        for entry in residency.hosts_own_entries()
        if entry.model in _numbers and _numbers[entry.model] in numbers
    ]


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
