"""Brings models home and parks them, always through ComfyUI's model management.

So its list of loaded models is true: what is resident is in it, it evicts what must go for us, and
when it needs room it finds our models. Without ComfyUI (a script that imports the nodes) the core
does it alone.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch

import qmove_core as qmove
from qmove_core import for_hosts

from .. import comfy, hooks, meter, progress, settings
from ..contract import HostEntry, ListedModel
from ..guard import is_interrupt, never_fails
from . import page_locks, pins
from .adopted import Adopted, adopt, adopted_models
from .entries import Entry, entries_of, known_entries

log = logging.getLogger("qmove")

Model = Adopted | HostEntry  # one that qmove moves, or one of ComfyUI's own

EVERYTHING = 1e30  # bytes; what ComfyUI itself asks for when it unloads all

_something_moved = False
_left: set[str] = set()  # kinds of objects in ComfyUI's list that were said to be left alone


def take_in(models: Iterable[Any], *, registered: bool = True) -> list[Adopted]:
    """Adopts models, and registers those on a device with ComfyUI (unless they leave at once).

    With auto-parking off what is new is only shown to the user, until somebody moves it.
    """
    result: dict[int, Adopted] = {}
    known = {adopted.number for adopted in adopted_models()}
    for model in models:
        adopted, parts = adopt(model)
        _drop([entry for part in parts for entry in entries_of(part)])
        if adopted.number not in known:
            adopted.only_shown = not settings.auto_park()
        result[adopted.number] = adopted
    if registered:
        register(result.values())
    return list(result.values())


def register(models: Iterable[Adopted]) -> None:
    """Lists what is resident as loaded in ComfyUI, and takes out what left a device for good.

    What stays where it is (`pins.py`) is not listed, so that ComfyUI does not try to evict it.
    Only the list changes. ComfyUI's own `load_models_gpu` would make room for computing first, and
    evict other models for a line in its list.
    """
    host = comfy.model_management()
    models = [adopted for adopted in models if not adopted.only_shown]
    if host is None or not models:
        return
    _alive = [adopted.model for adopted in models]  # until ComfyUI has asked for all sizes
    listed = _ids_listed()
    staying = [adopted for adopted in models if pins.stays(adopted)]
    _drop([entry for adopted in staying for entry in entries_of(adopted)])
    entries = [e for adopted in models if adopted not in staying for e in entries_of(adopted)]
    _drop([entry for entry in entries if id(entry) in listed and not entry.model_size()])
    for entry in entries:
        if id(entry) in listed:
            continue
        entry.is_listed = False
        if entry.loaded_size():
            line = host.LoadedModel(entry)
            line.model_load()
            host.current_loaded_models.insert(0, line)


def _ids_listed() -> set[int]:
    host = comfy.model_management()
    lines = host.current_loaded_models if host is not None else ()
    return {id(_entry_of(line)) for line in lines}


def keep_listed() -> bool:
    """From now on ComfyUI's list is whole whenever ComfyUI looks for what can go.

    Some packs empty it (`current_loaded_models.clear()`): the models stay where they are, and
    nothing could evict them any more. Returns whether ComfyUI's function is as expected.
    """
    host: Any = comfy.model_management()
    if not hooks.fits(host, "free_memory", 2):
        log.warning(
            "This ComfyUI makes room in another way than qmove knows: where a pack empties its "
            "list of loaded models, parked ones are in it again only when they have moved."
        )
        return False
    original = host.free_memory

    @functools.wraps(original)
    def free_memory(*args: Any, **options: Any) -> Any:
        list_again()
        page_locks.book()
        return original(*args, **options)

    hooks.wrap(host, "free_memory", free_memory)
    return True


@never_fails("list again what was taken out of ComfyUI's list", None)
def list_again() -> None:
    """Lists our models that somebody else has taken out of ComfyUI's list."""
    expected = [entry for entry in known_entries() if entry.is_listed]
    listed = _ids_listed() if expected else set()
    if any(id(entry) not in listed for entry in expected):
        register(adopted_models())


def note_move() -> None:
    """Something has moved, perhaps without ComfyUI: a parked model that was used has woken."""
    global _something_moved
    _something_moved = True


def register_woken() -> bool:
    """Registers models that came onto a device without ComfyUI; returns whether any moved."""
    global _something_moved
    moved, _something_moved = _something_moved, False
    if moved:
        register(adopted_models())
    return moved


def bring_home(models: Collection[Adopted], keep: Collection[Model] = ()) -> None:
    """Makes the models resident. ComfyUI first evicts what it must, but none of these, nor `keep`.

    Raises:
        NotEnoughMemory: there is too little room all the same.
    """
    away = [adopted for adopted in models if adopted.parked and not adopted.left_alone]
    _alive = [adopted.model for adopted in away]
    coming: Counter[torch.device] = Counter()
    for adopted in away:
        coming.update(adopted.parked)
    for device, nbytes in coming.items():
        if (meter.free_bytes(device) or 0) + yielding_bytes(device, keep) < nbytes:
            make_room(device, nbytes, [*models, *keep])
    try:
        for adopted in away:
            adopted.come_home()
    finally:
        register_again(models)


def swap(leaving: Adopted, coming: Adopted) -> None:
    """Parks one model while another comes home: neither RAM nor VRAM needs room for both."""
    _alive = leaving.model, coming.model
    _drop(entries_of(leaving))
    nbytes = [sum(leaving.resident.values()), sum(coming.parked.values())]
    try:
        with (
            progress.shown("park", leaving.name, leaving.number, nbytes[0]) as going,
            progress.shown("restore", coming.name, coming.number, nbytes[1]) as arriving,
        ):

            def report(done: int, total: int) -> None:
                share = done / max(total, 1)
                going.report(int(share * nbytes[0]), nbytes[0])
                arriving.report(int(share * nbytes[1]), nbytes[1])

            going.result, arriving.result = qmove.swap(
                leaving.movable, coming.movable, progress=report
            )
    finally:
        register_again([leaving, coming])


def register_again(models: Iterable[Adopted]) -> None:
    """After a request that may have failed, and whose entries ComfyUI may have taken out."""
    try:
        register(models)
    except Exception as error:
        log.debug("could not register models again: %s", str(error))


def park(models: Collection[Model]) -> None:
    """Parks adopted models, and has ComfyUI unload its own ones."""
    ours = [model for model in models if isinstance(model, Adopted)]
    try:
        with for_hosts.released_once():
            for adopted in ours:
                adopted.park(may_go=True)
    finally:
        entries = [entry for adopted in ours for entry in entries_of(adopted)]
        _drop([entry for entry in entries if not entry.loaded_size()])
        _unload([model for model in models if not isinstance(model, Adopted)])
    host = comfy.model_management()
    if host is not None and models:
        host.soft_empty_cache()


def park_until_free(order: Sequence[Model], device: torch.device, nbytes: float) -> list[Model]:
    """Parks models in this order until `nbytes` are free on `device`; returns those it parked."""
    done: list[Model] = []
    with for_hosts.released_once():
        for model in order:
            if (meter.free_bytes(device) or 0) >= nbytes:
                break
            try:
                park([model])
            except qmove.Pinned as error:  # with what it is a part of
                log.debug("%s", error)
                continue
            done.append(model)
    return done


def evictable_models(used: Collection[Adopted]) -> list[Adopted]:
    """Idle models that may go without anybody's word: not what another manager moves, nor what is
    only shown."""
    return [m for m in idle_models(used) if m.moved_by is None and not m.only_shown]


@never_fails("follow the switch of auto-parking", None)
def follow_auto_park() -> None:
    """After the switch was turned on: what was only shown can leave like all others."""
    if settings.auto_park():
        shown = [adopted for adopted in adopted_models() if adopted.only_shown]
        for adopted in shown:
            adopted.only_shown = False
        register(shown)


def idle_models(used: Collection[Adopted]) -> list[Adopted]:
    """Adopted models that are on a device, may leave it, and are not `used`."""
    numbers = {adopted.number for adopted in used}
    idle = [m for m in adopted_models() if m.number not in numbers and m.resident]
    return [adopted for adopted in idle if not pins.stays(adopted)]


def hosts_own_entries() -> list[HostEntry]:
    """ComfyUI's own loaded models. What is in its list and is none of its kind is left to it."""
    host = comfy.model_management()
    entries = [_entry_of(line) for line in host.current_loaded_models] if host is not None else []
    return [e for e in entries if e is not None and type(e) is not Entry and _is_known_kind(e)]


def _entry_of(line: Any) -> Any:
    """What a line of ComfyUI's list stands for; None where it has died, or is no such line."""
    try:
        return line.model
    except Exception as error:
        _leave(line, error)
        return None


def _is_known_kind(entry: Any) -> bool:
    """Whether an entry answers as ComfyUI's own do: some packs list objects of theirs."""
    try:
        _ = (
            entry.__class__,
            entry.model,
            int(entry.loaded_size()),
            int(entry.model_size()),
            is_dynamic(entry),
        )
        if not isinstance(entry.load_device, torch.device):
            raise TypeError("its load_device is no device")
        return True
    except Exception as error:
        _leave(entry, error)
        return False


def _leave(stranger: object, error: Exception) -> None:
    if type(stranger).__name__ not in _left:
        _left.add(type(stranger).__name__)
        log.warning(
            "In ComfyUI's list of loaded models is a %s that qmove cannot read (%s): it is left to "
            "ComfyUI.",
            type(stranger).__name__,
            type(error).__name__,
        )


def idle_patchers(used: Collection[HostEntry]) -> list[HostEntry]:
    """ComfyUI's own loaded models that are not `used`, without those that yield by themselves, and
    those that the user has pinned."""
    models = {id(patcher.model) for patcher in used}  # clones share the model
    idle = [entry for entry in hosts_own_entries() if id(entry.model) not in models]
    return [entry for entry in idle if not is_dynamic(entry) and not pins.stays(entry)]


def is_dynamic(entry: HostEntry) -> bool:
    """Whether it yields to whatever is allocated (comfy-aimdo); its memory is not PyTorch's."""
    return bool(getattr(entry, "is_dynamic", lambda: False)())  # it is there from 0.18.2


def yielding_bytes(device: torch.device, used: Collection[Model] = ()) -> int:
    """Bytes on `device` that ComfyUI's dynamic models give up by themselves, but for the `used`.

    They are in no figure of what is free, and allocations succeed all the same.
    """
    return sum(int(entry.loaded_size()) for entry in _yielding(device, used))


def _yielding(device: torch.device, used: Collection[Model]) -> list[HostEntry]:
    models = {id(entry.model) for entry in used}  # clones share the model
    return [
        entry
        for entry in hosts_own_entries()
        if entry.load_device == device and id(entry.model) not in models and is_dynamic(entry)
    ]


def have_dynamic_yield(device: torch.device, nbytes: int, keep: Collection[Model] = ()) -> None:
    """Has ComfyUI's dynamic models give up what is missing of `nbytes` on `device`, as far as they
    can: the core moves nothing to where too little is free."""
    dynamic = _yielding(device, keep)
    if dynamic and (meter.free_bytes(device) or 0) < nbytes:
        _free(nbytes, device, _lines_of(dynamic)[1])


def make_room(device: torch.device, nbytes: int, keep: Iterable[Model]) -> None:
    """Has ComfyUI evict models until `nbytes` are free on `device`: first the dynamic ones, whose
    pages come back as they are used, then others in its own order."""
    host = comfy.model_management()
    keep = list(keep)
    have_dynamic_yield(device, nbytes, keep)
    if host is not None and not _free(nbytes, device, _lines_of(_entries_of(keep))[0]):
        ours = evictable_models([model for model in keep if isinstance(model, Adopted)])
        park_until_free([model for model in ours if device in model.resident], device, nbytes)


def _free(nbytes: float, device: torch.device, keep: Sequence[ListedModel]) -> bool:
    """Asks ComfyUI for room. Returns whether it could look: it may fail at a stranger."""
    host = comfy.model_management()
    try:
        if host is not None:
            host.free_memory(nbytes, device, keep)
        return True
    except Exception as error:
        if is_interrupt(error):
            raise
        _leave(host, error)
        return False


def _entries_of(models: Iterable[Model]) -> list[HostEntry | Entry]:
    entries: list[HostEntry | Entry] = []
    for model in models:
        entries += entries_of(model) if isinstance(model, Adopted) else [model]
    return entries


def _unload(patchers: Sequence[HostEntry]) -> None:
    """Has ComfyUI unload exactly these: it is asked for everything, with all others to keep."""
    host = comfy.model_management()
    wanted, others = _lines_of(patchers)
    if host is not None and wanted:
        for device in dict.fromkeys(patcher.load_device for patcher in patchers):
            _free(EVERYTHING, device, others)


def _lines_of(entries: Iterable[HostEntry | Entry]) -> tuple[list[ListedModel], list[ListedModel]]:
    """Of ComfyUI's list of loaded models the lines of these entries, and all other lines."""
    list_again()
    host = comfy.model_management()
    # Clones of a patcher share its model; an entry speaks only for one device of its model.
    ids = {id(entry) if isinstance(entry, Entry) else id(entry.model) for entry in entries}
    lines: tuple[list[ListedModel], list[ListedModel]] = ([], [])
    for line in host.current_loaded_models if host is not None else []:
        entry = _entry_of(line)
        is_ours = type(entry) is Entry
        known = is_ours or (entry is not None and _is_known_kind(entry))
        key = id(entry) if is_ours or not known else id(entry.model)
        lines[key not in ids].append(line)
    return lines


def _drop(entries: Collection[Entry]) -> None:
    """Takes entries out of ComfyUI's list. Their models stay where they are."""
    host = comfy.model_management()
    for entry in entries:
        entry.is_listed = False
    if host is None or not entries:
        return
    ids = {id(entry) for entry in entries}
    for index in range(len(host.current_loaded_models) - 1, -1, -1):
        line = host.current_loaded_models[index]
        if id(_entry_of(line)) in ids:
            del host.current_loaded_models[index]
            if line.model_finalizer is not None:
                line.model_finalizer.detach()
