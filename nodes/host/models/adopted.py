"""The models that qmove knows in this ComfyUI: their true sizes, and which modules are their parts.

A model is adopted when it appears on a wire, is given to one of our nodes, or is found where a pack
hides it. All references to it are weak: adopting a model keeps nothing alive.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

import qmove_core as qmove
from qmove_core import for_hosts

from .. import progress
from . import managers, names
from .emptied import is_emptied
from .loose_tensors import LooseTensors, living_groups

log = logging.getLogger("qmove")

_numbers = itertools.count(1)
_uses = itertools.count(1)
# Each adopted model, and each module of one; the values die with the model.
_by_model: WeakIdKeyDictionary = WeakIdKeyDictionary()  # -> Adopted
_by_module: WeakIdKeyDictionary = WeakIdKeyDictionary()  # -> weak reference to an Adopted


class Keeper(Protocol):
    """Who keeps models alive, and lets go of some where RAM is short (`pool`)."""

    def make_room_for(self, leaving: Adopted, nbytes: int, *, may_go: bool) -> bool: ...
    def has_no_disk_for(self, leaving: Adopted, nbytes: int, *, may_go: bool) -> None: ...
    def let_go_of(self, adopted: Adopted) -> bool: ...


_keeper: Keeper | None = None


def set_keeper(keeper: Keeper | None) -> None:
    """Names who is asked before a model is parked, and where RAM has no room for it."""
    global _keeper
    _keeper = keeper


class Adopted:
    """One model: a module, an object that holds tensors of its own, or tensors without an owner.

    Attributes:
        place: where it was found, in words; empty for one that came on a wire.
        users: the node classes that keep it themselves, so that no wire tells of it.
        number: its id for as long as the process runs; never used again.
        last_used: grows from use to use of any model; 0 for one that was not used yet.
        last_used_at: seconds since the epoch; None for one that was not used yet.
        description: what people call it, for the browser.
        left_alone: the user wants that qmove does not touch it (`pins.py`).
        only_shown: auto-parking is off and nobody has asked for it to be moved: it is in the
            browser's list, and in nobody's who makes room.
    """

    def __init__(self, model: Any) -> None:
        self.number = next(_numbers)
        self.last_used = 0
        self.last_used_at: float | None = None
        self.description = for_hosts.Description()
        self.place = ""
        self.left_alone = False
        self.only_shown = False
        self.users: weakref.WeakSet[type] = weakref.WeakSet()  # a class may hold the model
        self._model = weakref.ref(model)
        self._fingerprint: object = None
        self._footprint = for_hosts.Footprint()
        self.refresh()

    @property
    def model(self) -> Any:
        """The model, None once it is dead."""
        return self._model()

    @property
    def movable(self) -> Any:
        """What the core is to move for it."""
        model = self.model
        return model.tensors() if isinstance(model, LooseTensors) else model

    @property
    def name(self) -> str:
        """What its user calls it (`names`); for tensors without an owner, where they are kept."""
        model = self.model
        return model.place if isinstance(model, LooseTensors) else names.of(model)

    def note_use(self) -> None:
        self.last_used = next(_uses)
        self.last_used_at = time.time()

    def refresh(self) -> None:
        """Takes the inventory again if modules, parameters or buffers have changed."""
        fingerprint = _fingerprint(self.model)
        if fingerprint == self._fingerprint:
            return
        others = [other for other in adopted_models() if other is not self]
        elsewhere = {cdata for other in others for cdata in other.storages()}
        held = qmove.inventory(self.movable)
        self.description = for_hosts.describe(held)
        self._footprint = for_hosts.Footprint(held, elsewhere)
        self._fingerprint = fingerprint

    @property
    def resident(self) -> dict[torch.device, int]:
        """Bytes on each accelerator now."""
        return self._alive.resident

    @property
    def moved_by(self) -> str | None:
        """Who else moves its parts while it runs, and so decides where they are."""
        model = self.model
        return managers.manager_of(model) if isinstance(model, nn.Module) else None

    @property
    def lost(self) -> list[str]:
        """The names of its tensors whose bytes somebody has taken away (`storage.resize_(0)`)."""
        model = self.movable
        if model is None or not any(is_emptied(tensor) for tensor, _ in self._footprint.storages()):
            return []
        return [holding.name for holding in qmove.inventory(model).holdings if holding.lacks_bytes]

    @property
    def parked(self) -> dict[torch.device, int]:
        """Bytes parked now, by the accelerator that is their home."""
        return self._alive.parked

    @property
    def in_ram(self) -> int:
        """Bytes of RAM that it takes, parked or not. Host copies of what is on a device are none
        of them, nor is what looks into its own files."""
        return self._alive.in_ram

    @property
    def on_disk(self) -> int:
        """Bytes that are parked in files."""
        return self._alive.on_disk

    @property
    def mirrored(self) -> int:
        """Bytes on accelerators of which there is a host copy already."""
        return self._alive.mirrored

    @property
    def _alive(self) -> for_hosts.Footprint:
        """Where its bytes are: nowhere once it is dead, though something else may still hold its
        tensors."""
        return self._footprint if self.model is not None else for_hosts.Footprint()

    def park(self, free: dict[Any, int] | None = None, *, may_go: bool = False) -> None:
        """Parks it, or as much of it as it takes to free so many bytes on each of these devices.

        With `may_go` one that only the keeper keeps may be dropped instead, where RAM for it costs
        more than it is worth: not while ComfyUI goes through its list of loaded models.
        """
        park = functools.partial(qmove.park, free=free)
        nbytes = sum(self.resident.values() if free is None else free.values())
        if _keeper is None or not nbytes:
            self._move("park", park, nbytes)
            return
        if _keeper.make_room_for(self, nbytes, may_go=may_go):
            try:
                self._move("park", functools.partial(park, to="disk"), nbytes)
                return
            except qmove.CannotWriteToDisk as error:
                log.warning("%s", str(error))
            _keeper.has_no_disk_for(self, nbytes, may_go=may_go)
        try:
            self._move("park", park, nbytes)
            return
        except qmove.NotEnoughMemory as error:
            failure = error.with_traceback(None)  # its frames would keep the model
        if not (may_go and _keeper.let_go_of(self)):
            raise failure

    def park_on_disk(self) -> None:
        """Parks it on disk, also what is parked in RAM."""
        self._move("park", functools.partial(qmove.park, to="disk"), self.in_ram)

    def come_home(self) -> None:
        self._move("restore", qmove.restore, sum(self.parked.values()))

    def _move(self, verb: str, move: Callable[..., Any], nbytes: int) -> None:
        model = self.movable
        if model is not None and nbytes:
            self.only_shown = False
            with progress.shown(verb, self.name, self.number, nbytes) as shown:
                shown.result = move(model, progress=shown.report)

    def weights(self) -> Counter[tuple[int, int]]:
        """How often it has bytes with this digest and size, as far as digests are known: of what is
        parked, or has a host copy."""
        if self.model is None:
            return Counter()
        storages = [storage for _tensor, storage in self._footprint.storages()]
        known = [(for_hosts.known_digest(s), s.nbytes()) for s in storages]
        return Counter((digest, nbytes) for digest, nbytes in known if digest is not None)

    def storages(self) -> set[int]:
        """The `_cdata` of its storages, wherever they are now."""
        return {storage._cdata for _, storage in self._footprint.storages()}


def adopted_models() -> list[Adopted]:
    """All adopted models, in the order in which they were adopted."""
    living_groups()
    known = list(_by_model.data.items())  # at once: other threads adopt
    living = [adopted for model, adopted in known if model() is not None]
    return sorted(living, key=lambda adopted: adopted.number)


def adopted_of(model: object) -> Adopted | None:
    """The adopted model that this object is, or is a module of."""
    adopted = _by_model.get(model) if can_be_adopted(model) else None
    if adopted is None and isinstance(model, nn.Module):
        reference = _by_module.get(model)
        adopted = reference() if reference is not None else None
    return adopted if adopted is not None and adopted.model is not None else None


def adopt(model: Any) -> tuple[Adopted, list[Adopted]]:
    """Adopts a model; one that is part of an adopted model is that model.

    Returns:
        The adopted model; and those that are now parts of it, whose entries ComfyUI should drop.
    """
    with for_hosts.lock:
        adopted = adopted_of(model)
        if adopted is not None:
            adopted.refresh()
            return adopted, []
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        parts = {id(part): part for module in modules if (part := adopted_of(module)) is not None}
        for part in parts.values():
            _by_model.pop(part.model, None)
        adopted = Adopted(model)
        adopted.left_alone = any(part.left_alone for part in parts.values())
        _by_model[model] = adopted
        reference = weakref.ref(adopted)
        for module in modules:
            _by_module[module] = reference
        log.debug("adopted %s", adopted.name)
        return adopted, list(parts.values())


def can_be_adopted(model: object) -> bool:
    """Whether the object allows weak references, which adopting needs."""
    return type(model).__weakrefoffset__ != 0


def _fingerprint(model: Any) -> object:
    """Changes when tensors come or go. Cheap: an inventory looks at every object of the model."""
    if isinstance(model, LooseTensors):
        return model.ids()
    if not isinstance(model, nn.Module):
        values = getattr(model, "__dict__", {}).items()
        return tuple(sorted((name, id(value)) for name, value in values))
    modules = tensors = mixed = 0
    for module in model.modules():
        modules += 1
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            tensors += 1
            mixed ^= id(tensor) * tensors
    return modules, tensors, mixed
