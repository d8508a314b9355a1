"""Which storages are away from home, and which models are parked: the state that all of qmove shares."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

lock = threading.RLock()  # held for the whole of each move: two threads never move at once


@dataclass(slots=True)
class Origin:
    """Where a host storage of the arena came from.

    Attributes:
        home: the device it goes back to.
        nbytes: size of the storage.
        record: of the parked model it belongs to; None once it was moved to the CPU to be used there.
        strangers: tensor objects outside the model that looked into the storage and were taken along.
    """

    home: torch.device
    nbytes: int
    record: Record | None
    strangers: list[TensorWeakRef] = field(default_factory=list)


class Record:
    """A parked model. It is held weakly, so that being parked keeps nothing alive.

    Attributes:
        homes: the home of each name, for tensors that are replaced while the model is parked.
    """

    def __init__(self, model: object, extra: Iterable[object], homes: Mapping[str, torch.device]) -> None:
        self.homes = dict(homes)
        self._id = id(model)
        self._is_whole = _can_be_weak(model)
        self._model = _weak_leaves(model)
        self._extra = [ref for root in extra for ref in _weak_leaves(root)]

    @property
    def model(self) -> Any:
        """The model; for one that cannot be referred to weakly (a dict, a list) what it held; None if all of it is gone."""
        alive = _alive(self._model)
        return (alive[0] if self._is_whole else alive) if alive else None

    @property
    def extra(self) -> list[object]:
        """The objects that were parked with the model, as far as they are still alive."""
        return _alive(self._extra)

    def is_for(self, model: object) -> bool:
        """Whether exactly this object was parked."""
        return self._id == id(model) and (self.model is model if self._is_whole else self.model is not None)


_origins: dict[int, Origin] = {}


def remember(storage: torch.UntypedStorage, origin: Origin) -> None:
    """Notes where a storage of the arena came from. The arena calls `forget` when the storage dies."""
    _origins[storage._cdata] = origin


def forget(storage_cdata: int) -> None:
    """Drops what is known of a storage."""
    _origins.pop(storage_cdata, None)


def origin_of(storage: torch.UntypedStorage) -> Origin | None:
    """Where the storage came from; None if it is no storage of the arena."""
    return _origins.get(storage._cdata)


def parked_home(tensor: torch.Tensor) -> torch.device | None:
    """The home of a parked tensor, None for one that is not parked."""
    with torch._C.DisableTorchFunctionSubclass():
        if hasattr(type(tensor), "__tensor_flatten__"):
            names, _context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            homes = (parked_home(getattr(tensor, name)) for name in names)
            return next((home for home in homes if home is not None), None)
        origin = origin_of(tensor.untyped_storage())
    return origin.home if origin is not None and origin.record is not None else None


def records() -> list[Record]:
    """One record for each model of which anything is parked, the longest parked first."""
    found = {id(origin.record): origin.record for origin in list(_origins.values()) if origin.record is not None}
    return [record for record in found.values() if record.model is not None]


def parked_bytes() -> dict[str, int]:
    """Bytes parked now, by the device they came from."""
    totals: dict[str, int] = defaultdict(int)
    for origin in list(_origins.values()):
        if origin.record is not None:
            totals[str(origin.home)] += origin.nbytes
    return dict(totals)


def record_of(model: object) -> Record | None:
    """The newest record of exactly this object."""
    return next((record for record in reversed(records()) if record.is_for(model)), None)


def _can_be_weak(obj: object) -> bool:
    return type(obj).__weakrefoffset__ != 0


def _weak_leaves(obj: object) -> list[Callable[[], Any]]:
    """Weak references to an object, or to what a container that allows none holds."""
    if isinstance(obj, torch.Tensor):
        return [TensorWeakRef(obj)]
    if _can_be_weak(obj):
        return [weakref.ref(obj)]
    if isinstance(obj, Mapping):
        return [ref for value in obj.values() for ref in _weak_leaves(value)]
    if isinstance(obj, (list, tuple, set, frozenset)):
        return [ref for value in obj for ref in _weak_leaves(value)]
    return []


def _alive(refs: Iterable[Callable[[], Any]]) -> list[Any]:
    return [obj for ref in refs if (obj := ref()) is not None]
