"""Which storages are away from home, and which models are parked: the state that all of qmove shares."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from .digests.digest import Digest
from .slots import slots_of

lock = threading.RLock()  # held for the whole of each move: two threads never move at once


@dataclass(slots=True)
class Origin:
    """Where a host storage of the arena came from.

    Attributes:
        home: the device it goes back to.
        nbytes: size of the storage.
        record: of the parked model it belongs to; None once it was moved to the CPU to be used there.
        strangers: tensor objects outside the model that looked into the storage and were taken along.
        digest: of the bytes that were parked, where it was taken.
    """

    home: torch.device
    nbytes: int
    record: Record | None
    strangers: list[TensorWeakRef] = field(default_factory=list)
    digest: Digest | None = None

    def strangers_on(self, storage: torch.UntypedStorage) -> list[torch.Tensor]:
        """Those of the strangers that are alive and still look into the storage."""
        alive = [tensor for ref in self.strangers if (tensor := ref()) is not None]
        return [tensor for tensor in alive if tensor.untyped_storage()._cdata == storage._cdata]


class Record:
    """A parked model. It is held weakly, so that being parked keeps nothing alive.

    A record lives as long as anything of the model is parked, or a module of it is asleep.

    Attributes:
        homes: the home of each name, for tensors that are replaced while the model is parked.
    """

    def __init__(
        self, model: object, extra: Iterable[object], homes: Mapping[str, torch.device]
    ) -> None:
        self.homes = dict(homes)
        self._model = _weakly(model)
        self._extra = [_weakly(root) for root in extra]
        self._number = next(_numbers)

    @property
    def model(self) -> Any:
        """The model; of one that allows no weak reference (a dict, a list) a copy of what is left of it; None if it is gone."""
        return self._model()

    @property
    def extra(self) -> list[object]:
        """The objects that were parked with the model, as far as they are still alive."""
        return [root for ref in self._extra if (root := ref()) is not None]

    def is_for(self, model: object) -> bool:
        """Whether this object was parked; for a dict or list, whether it holds all that is left of what was parked."""
        own = self.model
        if own is None or (_contents(own) is None) != (_contents(model) is None):
            return False
        return _leaves(own) <= _leaves(model)


_numbers = itertools.count()
_living: weakref.WeakSet[Record] = weakref.WeakSet()
_origins: dict[int, Origin] = {}


def remember(storage: torch.UntypedStorage, origin: Origin) -> None:
    """Notes where a storage of the arena came from. The arena calls `forget` when the storage dies."""
    _origins[storage._cdata] = origin
    if origin.record is not None:
        _living.add(origin.record)


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
    found = {
        id(origin.record): origin.record
        for origin in list(_origins.values())
        if origin.record is not None
    }
    return [record for record in found.values() if record.model is not None]


def parked_bytes() -> dict[str, int]:
    """Bytes parked now, by the device they came from."""
    totals: dict[str, int] = defaultdict(int)
    for origin in list(_origins.values()):
        if origin.record is not None:
            totals[str(origin.home)] += origin.nbytes
    return dict(totals)


def parked_models() -> list[Any]:
    """The model of each record, the longest parked first, no model twice."""
    models = [record.model for record in records()]
    return list({_leaves(model): model for model in models if model is not None}.values())


def record_of(model: object) -> Record | None:
    """The newest record of exactly this object."""
    return max(
        (record for record in _living if record.is_for(model)),
        key=lambda record: record._number,
        default=None,
    )


def _contents(obj: object) -> dict[Any, object] | list[object] | None:
    """What an object holds that allows no weak reference, and so counts as its contents (a dict, a list, an object with
    `__slots__`); None for one that allows it, and for plain values.
    """
    if _allows_weak_reference(obj):
        return None
    if isinstance(obj, dict):
        # Keys that are no names may be what a model must not be kept alive by: an optimizer's state has parameters there.
        return {
            key if isinstance(key, (str, int)) else f"[{i}]": value
            for i, (key, value) in enumerate(obj.items())
        }
    if isinstance(obj, (list, tuple, set, frozenset)):
        return list(obj)
    slots = slots_of(type(obj))  # type: ignore[arg-type]
    return {slot: getattr(obj, slot, None) for slot in slots} or None


def _allows_weak_reference(obj: object) -> bool:
    return type(obj).__weakrefoffset__ != 0


def _weakly(obj: object, within: frozenset[int] = frozenset()) -> Callable[[], Any]:
    """A weak reference to an object, or what makes a copy of its contents from those that are still alive."""
    if isinstance(obj, torch.Tensor):
        return TensorWeakRef(obj)
    contents = _contents(obj)
    if contents is None:
        return weakref.ref(obj) if _allows_weak_reference(obj) else lambda: None
    if id(obj) in within:
        return lambda: None
    within |= {id(obj)}
    if isinstance(contents, dict):
        named = {name: _weakly(value, within) for name, value in contents.items()}
        return lambda: _unless_all_gone({name: ref() for name, ref in named.items()})
    items = [_weakly(item, within) for item in contents]
    return lambda: _unless_all_gone([ref() for ref in items])


def _unless_all_gone(contents: Any) -> Any:
    items = contents.values() if isinstance(contents, dict) else contents
    return None if all(item is None for item in items) else contents


def _leaves(obj: object, within: frozenset[int] = frozenset()) -> frozenset[int]:
    """The ids of the objects that make up the contents of an object; of one that allows weak references its own id."""
    contents = _contents(obj)
    if contents is None:
        return frozenset({id(obj)}) if _allows_weak_reference(obj) else frozenset()
    if id(obj) in within:
        return frozenset()
    items = contents.values() if isinstance(contents, dict) else contents
    return frozenset().union(*(_leaves(item, within | {id(obj)}) for item in items))
