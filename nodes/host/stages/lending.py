"""VRAM for another program that shares the card: all of it goes back to the system, and what the
last prompt used comes home again."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from typing import Any

import torch

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import comfy, meter, settings
from ..contract import HostEntry
from ..models import finding, names, pins, residency
from ..models.adopted import Adopted, adopted_models
from ..models.residency import Model
from ..panel import events
from . import job_queue, last_run

log = logging.getLogger("qmove")


def release(*, by_itself: bool = False) -> dict[str, Any]:
    """Gives all VRAM back to the system, cached blocks too; the models wait in RAM.

    ComfyUI unloads its own. What the user has pinned stays. A model that cannot leave stops no
    other.

    Args:
        by_itself: nobody has asked for it just now: what lies in memory that the CPU shares stays,
            as parking it would free nothing.

    Returns:
        Plain data for an answer. "report": a line for each device. "devices": for each its name,
        and in bytes its size, what is free for any program, how much more that is than before
        (these are None where nobody can tell), what PyTorch still holds, and the models that
        "stayed", with the reason. "error": why models could not leave; it is missing where all that
        may leave have left.
    """
    finding.look()
    before = {device: for_hosts.memory_without_context(device) for device in meter.devices()}
    reasons: dict[int, str] = {}
    with for_hosts.released_once():
        for model in _in_vram():
            if pins.stays(model):
                reasons[_identity(model)] = f"it is {pins.in_words(model)}"
            elif by_itself and all(map(for_hosts.shares_memory_with_host, _resident(model))):
                reasons[_identity(model)] = "its device shares its memory with the CPU"
            else:
                try:
                    residency.park([model])
                except (qmove.QMoveError, torch.OutOfMemoryError) as error:
                    reasons[_identity(model)] = str(error)
    _empty_caches()
    devices = [_figures(device, memory, reasons) for device, memory in before.items()]
    lines = [_line(device) for device in devices]
    released = {
        "report": "\n".join(lines) or "This machine has no accelerator.",
        "devices": devices,
    }
    failed = [
        f"{stayed['name']} stays on {device['name']}: {stayed['reason']}"
        for device in devices
        for stayed in device["stayed"]
        if not stayed["pinned"]
    ]
    return released | {"error": "\n".join(failed)} if failed else released


def take_back() -> dict[str, Any]:
    """Begins to bring home what the last prompt used, as far as there is room for it beside what is
    there; nothing else leaves for it. It goes on in the background, when no node runs.

    Returns:
        Plain data for an answer. "began": name, device and bytes of each part that comes; "stays":
        the same of each that has no room now. "report": the same in words.
    """
    began, stays = _plan()
    if began or stays:
        job_queue.run_in_background(_bring_back)
    lines = [f"{name} begins to come home to {d}: {readable_bytes(n)}." for name, d, n in began]
    lines += [_no_room(name, device, nbytes) for name, device, nbytes in stays]
    return {
        "report": "\n".join(lines) or "Nothing that the last prompt used is away.",
        "began": [_part(*part) for part in began],
        "stays": [_part(*part) for part in stays],
    }


Part = tuple[str, torch.device, int]  # a model's name, where it comes to, bytes


def _bring_back() -> str:
    try:
        lines = [line for model in _away() for line in _bring(model)]
        return "\n".join(lines) or "Nothing that the last prompt used is away."
    finally:
        events.send_if_changed()


def _bring(model: Model) -> Iterator[str]:
    coming = _coming(model)
    full = [device for device, nbytes in coming.items() if nbytes > _room(device)]
    if full:
        yield from (_no_room(_name(model), device, coming[device]) for device in full)
        return
    host = comfy.model_management()
    if isinstance(model, Adopted):
        residency.bring_home([model])
    elif host is not None:
        with torch.inference_mode():  # as in a prompt
            host.load_models_gpu([model])
    for device, nbytes in coming.items():
        yield f"{_name(model)} is home again: {readable_bytes(nbytes)} on {device}."


def _plan() -> tuple[list[Part], list[Part]]:
    """What would come now, and what has no room beside that."""
    began: list[Part] = []
    stays: list[Part] = []
    room = {device: _room(device) for device in meter.devices()}
    for model in _away():
        coming = _coming(model)
        fits = all(nbytes <= room.get(device, 0) for device, nbytes in coming.items())
        for device, nbytes in coming.items():
            (began if fits else stays).append((_name(model), device, nbytes))
            if fits:
                room[device] -= nbytes
    return began, stays


def _away() -> list[Model]:
    """What the last prompt used and is not home. Dynamic models come as they are used."""
    used: list[Model] = [m for m in last_run.models() if m.model is not None and not m.left_alone]
    used += [p for p in last_run.patchers() if not residency.is_dynamic(p)]
    return [model for model in used if _coming(model)]


def _coming(model: Model) -> dict[torch.device, int]:
    if isinstance(model, Adopted):
        return model.parked
    nbytes = int(model.model_size()) - int(model.loaded_size())
    return {model.load_device: nbytes} if nbytes > 0 else {}


def _room(device: torch.device) -> int:
    """Bytes that may come to a device without that anything leaves it."""
    free = (meter.free_bytes(device) or 0) + residency.yielding_bytes(device)
    return free - settings.vram_to_keep_free()


def _no_room(name: str, device: torch.device, nbytes: int) -> str:
    room = readable_bytes(max(0, _room(device)))
    return (
        f"{name} stays parked for now: it needs {readable_bytes(nbytes)}, and {room} are free on "
        f"{device}. It comes home when it is used."
    )


def _part(name: str, device: torch.device, nbytes: int) -> dict[str, Any]:
    return {"name": name, "device": str(device), "nbytes": nbytes}


def _in_vram() -> list[Model]:
    ours: list[Model] = [adopted for adopted in adopted_models() if adopted.resident]
    return [*ours, *(entry for entry in residency.hosts_own_entries() if entry.loaded_size())]


def _empty_caches() -> None:
    gc.collect()  # tensors in cycles
    host = comfy.model_management()
    if host is not None:
        host.soft_empty_cache()
    for_hosts.release_cached([d for d in meter.devices() if for_hosts.has_context(d)])


def _figures(
    device: torch.device, before: for_hosts.Memory | None, reasons: dict[int, str]
) -> dict[str, Any]:
    memory = for_hosts.memory_without_context(device)
    total = for_hosts.total_memory(device) if memory is None else memory.total
    freed = None if memory is None or before is None else memory.free - before.free
    return {
        "name": str(device),
        "total": total,
        "free": None if memory is None else memory.free,
        "freed": freed,
        "held": meter.reserved_bytes(device),
        "stayed": [
            {
                "name": _name(model),
                "nbytes": nbytes,
                "pinned": pins.stays(model),
                "reason": reasons.get(_identity(model), "a part of it stays; the log says why"),
            }
            for model in _in_vram()
            if (nbytes := _resident(model).get(device, 0))
        ],
    }


def _line(device: dict[str, Any]) -> str:
    free = "is given back" if device["free"] is None else f"{readable_bytes(device['free'])} free"
    line = f"{device['name']}: {free}"
    if device["freed"] is not None:
        line += f", {readable_bytes(max(0, device['freed']))} more than before"
    stayed = [f"{s['name']} ({readable_bytes(s['nbytes'])})" for s in device["stayed"]]
    return f"{line}; {for_hosts.first_of(stayed)} stayed." if stayed else f"{line}."


def _resident(model: Model) -> dict[torch.device, int]:
    if isinstance(model, Adopted):
        return model.resident
    return {model.load_device: int(model.loaded_size())}


def _name(model: Model) -> str:
    return model.name if isinstance(model, Adopted) else names.of(model.model)


def _identity(model: Adopted | HostEntry) -> int:
    return id(model) if isinstance(model, Adopted) else id(model.model)  # clones share the model
