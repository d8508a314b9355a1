"""The models that qmove knows in this ComfyUI, their true sizes, and who owns which module.

A model is adopted when it appears on a wire, or is given to one of our nodes. Everything here refers to models weakly: being
adopted keeps nothing alive, and with a model its entries in the host's books go.
"""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

import qmove_core as qmove
from qmove_core import homes

from .. import progress
from .description import Description, describe
from .entry import Entry

log = logging.getLogger("qmove")

_numbers = itertools.count(1)
_uses = itertools.count(1)
_by_model: WeakIdKeyDictionary = WeakIdKeyDictionary()  # model -> Adopted, which dies with it
_by_module: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # each module of an adopted model -> a weak reference to the Adopted


class Adopted:
    """One model: a module, or an object that holds tensors of its own.

    Attributes:
        number: names it for as long as the process runs; it is never used again.
        entries: one for each device that is home to a part of it.
        last_used: grows from use to use of any model; 0 for one that was not used yet.
        last_used_at: seconds since the epoch; None for one that was not used yet.
        description: what people call it, for the browser.
    """

    def __init__(self, model: Any) -> None:
        self.number = next(_numbers)
        self.last_used = 0
        self.last_used_at: float | None = None
        self.description = Description()
        self.entries: dict[torch.device, Entry] = {}
        self._model = weakref.ref(model)
        self._fingerprint: object = None
        self._holdings: list[list[TensorWeakRef]] = []
        self.refresh()

    @property
    def model(self) -> Any:
        return self._model()

    def note_use(self) -> None:
        self.last_used = next(_uses)
        self.last_used_at = time.time()

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def refresh(self) -> None:
        """Looks at the model again if its modules, parameters or buffers are not those of the last time."""
        fingerprint = _fingerprint(self.model)
        if fingerprint == self._fingerprint:
            self._find_devices()
            return
        elsewhere = {
            cdata for other in adopted_models() if other is not self for cdata in other._storages()
        }
        held = qmove.inventory(self.model)
        self.description = describe(held)
        holdings = [h for h in held.holdings if h.storage._cdata not in elsewhere]
        self._holdings = [
            [TensorWeakRef(tensor) for tensor in holding.tensors] for holding in holdings
        ]
        self._fingerprint = fingerprint
        self._find_devices()

    def _find_devices(self) -> None:
        for device in {*self._by_device(parked=False), *self._by_device(parked=True)}:
            if device not in self.entries:
                self.entries[device] = Entry(self, device)

    def resident_on(self, device: torch.device) -> int:
        """Bytes of the model on `device` now."""
        return self._by_device(parked=False).get(device, 0)

    def nbytes_of(self, device: torch.device) -> int:
        """Bytes whose home is `device`, there or parked."""
        return self.resident_on(device) + self._by_device(parked=True).get(device, 0)

    @property
    def resident(self) -> dict[torch.device, int]:
        """Bytes on each accelerator now."""
        return self._by_device(parked=False)

    @property
    def parked(self) -> dict[torch.device, int]:
        """Bytes parked now, by the accelerator that is their home."""
        return self._by_device(parked=True)

    def park(self) -> None:
        model, resident = self.model, self.resident
        if model is not None and resident:
            with progress.shown("park", self.name, self.number, sum(resident.values())) as move:
                move.result = qmove.park(model, progress=move.report)

    def come_home(self) -> None:
        model, parked = self.model, self.parked
        if model is not None and parked:
            with progress.shown("restore", self.name, self.number, sum(parked.values())) as move:
                move.result = qmove.restore(model, progress=move.report)

    def begin_to_come_home(self) -> bool:
        """Starts to bring the model home while something else computes; says whether there was room for it."""
        return self.model is not None and qmove.prefetch(self.model) is not None

    def _tensors(self) -> Iterable[torch.Tensor]:
        """One living tensor of each holding."""
        for references in self._holdings:
            tensor = next(
                (tensor for reference in references if (tensor := reference()) is not None), None
            )
            if tensor is not None:
                yield tensor

    def _storages(self) -> Iterable[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [tensor.untyped_storage()._cdata for tensor in self._tensors()]

    def _by_device(self, *, parked: bool) -> dict[torch.device, int]:
        totals: dict[torch.device, int] = defaultdict(int)
        if self.model is None:  # its tensors may outlive it, in somebody else's hands
            return totals
        with torch._C.DisableTorchFunctionSubclass():
            for tensor in self._tensors():
                storage = tensor.untyped_storage()
                if storage.device.type != "cpu":
                    if not parked:
                        totals[storage.device] += storage.nbytes()
                elif parked and (home := homes.parked_home(tensor)) is not None:
                    totals[home] += storage.nbytes()
        return dict(totals)


def adopted_models() -> list[Adopted]:
    """All adopted models, in the order in which they were adopted."""
    return sorted(_by_model.values(), key=lambda adopted: adopted.number) if _by_model.data else []


def adopted_of(model: object) -> Adopted | None:
    """The adopted model that this object is, or is a module of."""
    adopted = _by_model.get(model) if can_be_adopted(model) else None
    if adopted is None and isinstance(model, nn.Module):
        reference = _by_module.get(model)
        adopted = reference() if reference is not None else None
    return adopted if adopted is not None and adopted.model is not None else None


def adopt(model: Any) -> tuple[Adopted, list[Adopted]]:
    """Takes a model in; one that is part of an adopted model is that model.

    Returns:
        The adopted model; and those that are now parts of it, whose entries the host should drop.
    """
    with homes.lock:
        adopted = adopted_of(model)
        if adopted is not None:
            adopted.refresh()
            return adopted, []
        modules = list(model.modules()) if isinstance(model, nn.Module) else []
        parts = {id(part): part for module in modules if (part := adopted_of(module)) is not None}
        for part in parts.values():
            _by_model.pop(part.model, None)
        adopted = Adopted(model)
        _by_model[model] = adopted
        reference = weakref.ref(adopted)
        for module in modules:
            _by_module[module] = reference
        log.debug("adopted %s", adopted.name)
        return adopted, list(parts.values())


def can_be_adopted(model: object) -> bool:
    """Whether the object can be referred to weakly, as everything that is adopted must be."""
    return type(model).__weakrefoffset__ != 0


def _fingerprint(model: Any) -> object:
    """Changes when tensors come or go: cheap, where an inventory looks at every object of the model."""
    if not isinstance(model, nn.Module):
        return tuple(
            sorted((name, id(value)) for name, value in getattr(model, "__dict__", {}).items())
        )
    modules = tensors = mixed = 0
    for module in model.modules():
        modules += 1
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            tensors += 1
            mixed ^= id(tensor) * tensors
    return modules, tensors, mixed
