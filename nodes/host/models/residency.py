"""Who is on the device: brings adopted models home, parks them and ComfyUI's own, always by asking ComfyUI's model management.

So its books are true: what is resident is in its list, what it must evict for us it evicts, and when it needs room it finds our
models. Without a host (a script that imports the nodes) the core does it alone.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

from qmove_core import devices as core_devices

from .. import comfy
from ..contract import HostEntry, ModelManagement
from .adopted import Adopted, adopt, adopted_models
from .entry import Entry

log = logging.getLogger("qmove")

EVERYTHING = 1e30  # bytes; what the host itself asks for when it unloads all


def take_in(models: Iterable[Any], *, into_books: bool = True) -> list[Adopted]:
    """Adopts models, and puts those that are on a device into the host's books (not those that leave it at once)."""
    result: dict[int, Adopted] = {}
    for model in models:
        adopted, parts = adopt(model)
        for part in parts:
            _drop_entries(part.entries.values())
        result[adopted.number] = adopted
    if into_books:
        register(result.values())
    return list(result.values())


def register(models: Iterable[Adopted]) -> None:
    """Puts what is resident into the host's books, and takes out what left a device for good."""
    host = comfy.model_management()
    models = list(models)
    if host is None or not models:
        return
    _alive = [
        adopted.model for adopted in models
    ]  # until the host has asked for all that it wants to know
    listed = _listed(host)
    gone = [
        entry
        for adopted in models
        for entry in adopted.entries.values()
        if id(entry) in listed and not entry.model_size()
    ]
    _drop_entries(gone)
    missing = [
        e
        for adopted in models
        for e in adopted.entries.values()
        if id(e) not in listed and e.loaded_size()
    ]
    if missing:
        host.load_models_gpu(missing, force_full_load=True)


def note_move() -> None:
    """Something has moved, perhaps by itself: a parked model that was used has woken, and the host knows nothing of it."""
    global _something_moved
    _something_moved = True


_something_moved = False


def register_woken() -> None:
    """Puts models into the host's books that came onto a device without it."""
    global _something_moved
    if _something_moved:
        _something_moved = False
        register(adopted_models())


def bring_home(models: Collection[Adopted]) -> None:
    """Makes the models resident. The host first evicts what it must, but none of these."""
    host = comfy.model_management()
    _alive = [adopted.model for adopted in models]
    away = [adopted for adopted in models if adopted.parked]
    if not away:
        return
    if host is None:
        for adopted in away:
            adopted.come_home()
        return
    # All in one request: two would evict each other's models.
    entries = [
        entry for adopted in models for entry in adopted.entries.values() if entry.model_size()
    ]
    try:
        host.load_models_gpu(entries, force_full_load=True)
    except BaseException:
        _register_again(models)
        raise
    failures = [entry.failure for entry in entries if entry.failure is not None]
    if failures:
        raise failures[0]


def _register_again(models: Iterable[Adopted]) -> None:
    """After a failed request: the host has taken entries out to put them in again, and did not come to it."""
    try:
        register(models)
    except Exception as error:
        log.debug(
            "could not register models after a failed load, whose error is the one to tell: %s",
            error,
        )


def park(models: Collection[Adopted], patchers: Collection[HostEntry] = ()) -> None:
    """Parks adopted models, and has the host unload its own ones."""
    wanted: list[Any] = [entry for adopted in models for entry in adopted.entries.values()]
    _unload([*wanted, *patchers])
    for adopted in models:  # those the host did not know, or did not let go
        adopted.park()
    host = comfy.model_management()
    if host is not None and (models or patchers):
        host.soft_empty_cache()


def park_until_free(
    order: Sequence[Adopted | HostEntry], device: torch.device, nbytes: float
) -> list[Adopted | HostEntry]:
    """Parks models one by one, in this order, until `nbytes` are free on `device`; returns those it parked."""
    done: list[Adopted | HostEntry] = []
    for model in order:
        if (free_bytes(device) or 0) >= nbytes:
            break
        if isinstance(model, Adopted):
            park([model])
        else:
            park([], [model])
        done.append(model)
    return done


def idle_models(used: Collection[Adopted]) -> list[Adopted]:
    """Adopted models that are on a device and are not `used`."""
    numbers = {adopted.number for adopted in used}
    return [
        adopted
        for adopted in adopted_models()
        if adopted.number not in numbers and adopted.resident
    ]


def idle_patchers(used: Collection[HostEntry]) -> list[HostEntry]:
    """ComfyUI's own loaded models that are not `used`. Dynamic ones yield to allocations by themselves: never idle."""
    host = comfy.model_management()
    if host is None:
        return []
    models = {id(patcher.model) for patcher in used}  # clones share the model
    entries = [loaded.model for loaded in host.current_loaded_models]
    return [
        entry
        for entry in entries
        if entry is not None
        and not isinstance(entry, Entry)
        and id(entry.model) not in models
        and not _is_dynamic(entry)
    ]


def make_room(
    device: torch.device,
    nbytes: int,
    keep: Collection[Adopted] = (),
    keep_patchers: Collection[HostEntry] = (),
) -> None:
    """Has the host free VRAM until `nbytes` are free on `device`, in its own order, but none of what is to be kept."""
    host = comfy.model_management()
    if host is None:
        return
    kept: list[object] = [entry for adopted in keep for entry in adopted.entries.values()]
    models = {id(patcher.model) for patcher in keep_patchers}
    lines = [
        x
        for x in host.current_loaded_models
        if x.model in kept or (x.model is not None and id(x.model.model) in models)
    ]
    host.free_memory(nbytes, device, lines)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device`, as the host counts them; None if nobody can say."""
    host = comfy.model_management()
    return (
        int(host.get_free_memory(device)) if host is not None else core_devices.free_memory(device)
    )


@functools.cache  # the host asks for its devices at start too: they do not change
def devices() -> list[torch.device]:
    """The accelerators of this machine."""
    return [device for name in core_devices.known() if (device := torch.device(name)).type != "cpu"]


def _unload(entries: Sequence[HostEntry | Entry]) -> None:
    """Has the host unload exactly these: it frees everything, and is told to keep all others."""
    host = comfy.model_management()
    if host is None:
        return
    wanted = {id(entry) for entry in entries} | {
        id(e.model) for e in entries if not isinstance(e, Entry)
    }
    for device in dict.fromkeys(entry.load_device for entry in entries):
        keep = [
            x
            for x in host.current_loaded_models
            if x.model is None or not {id(x.model), id(x.model.model)} & wanted
        ]
        if len(keep) < len(host.current_loaded_models):
            host.free_memory(EVERYTHING, device, keep)


def _drop_entries(entries: Iterable[Entry]) -> None:
    """Takes entries out of the host's list while their models stay where they are."""
    entries = list(entries)
    if not entries:
        return
    for entry in entries:
        entry.leaving = True
    try:
        _unload(entries)
    finally:
        for entry in entries:
            entry.leaving = False


def _listed(host: ModelManagement) -> set[int]:
    return {id(loaded.model) for loaded in host.current_loaded_models}


def _is_dynamic(entry: HostEntry) -> bool:
    is_dynamic = getattr(entry, "is_dynamic", None)  # from 0.18.2
    return bool(is_dynamic and is_dynamic())
