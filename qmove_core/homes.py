"""Where host storages came from: the state that all of qmove shares, and the lock of every move."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

# Held for the whole of each move, so that two threads never move at once. Finalizers never take it.
lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    # A child has no thread that could release it. A model that was moving at the fork is half
    # moved there; every other one is whole, and its bytes in RAM can be read.
    os.register_at_fork(after_in_child=lock._at_fork_reinit)  # type: ignore[attr-defined]


@dataclass(slots=True)
class Origin:
    """Where a host storage came from.

    Attributes:
        home: the device it goes back to.
        nbytes: size of the storage.
        record: the parked model it belongs to (`parking/records.py`), opaque here; None for a model
            that was moved to the CPU to run there.
        tensors: the tensor objects that look into the storage, and go where it goes.
        digest: of the bytes that were parked, where it was taken.
        arrival: waits until the bytes are on their device and the tensors look at them; None while
            nothing is under way.
        parts: refer weakly to the outermost modules that it was parked with.
        is_result: it was computed on the host from parked tensors, and belongs to no model yet.
    """

    home: torch.device
    nbytes: int
    record: Any
    tensors: list[TensorWeakRef] = field(default_factory=list)
    digest: int | None = None
    arrival: Callable[[], None] | None = None
    parts: tuple[Callable[[], object], ...] = ()
    is_result: bool = False

    @property
    def is_away(self) -> bool:
        """Whether its tensors are parked or arriving, and answer that they are home."""
        return self.record is not None or self.arrival is not None

    @property
    def is_parked(self) -> bool:
        return self.record is not None and self.arrival is None

    def add(self, tensor: torch.Tensor) -> None:
        """Lets a tensor that looks into the storage go where it goes."""
        if len(self.tensors) >= 64 and len(self.tensors) & (len(self.tensors) - 1) == 0:
            self.tensors = [ref for ref in self.tensors if ref() is not None]
        self.tensors.append(TensorWeakRef(tensor))

    def tensors_on(
        self, storage: torch.UntypedStorage, but: Set[int] = frozenset()
    ) -> list[torch.Tensor]:
        """Those tensors that are alive and still look into the storage, without those whose `id` is
        among `but`."""
        found = [tensor for ref in self.tensors if (tensor := ref()) is not None]
        alive = [tensor for tensor in found if id(tensor) not in but] if but else found
        if not alive:
            return []
        with torch._C.DisableTorchFunctionSubclass():
            return [t for t in alive if t.untyped_storage()._cdata == storage._cdata]


_origins: dict[int, Origin] = {}  # by storage._cdata


def remember(storage: torch.UntypedStorage, origin: Origin) -> None:
    """Notes where a host storage came from, until it dies (the arena calls `forget`)."""
    _origins[storage._cdata] = origin


def forget(storage_cdata: int) -> None:
    """Drops what is known of a storage."""
    _origins.pop(storage_cdata, None)


def origin_of(storage: torch.UntypedStorage) -> Origin | None:
    """Where the storage came from; None if nothing of it was moved to the host."""
    return _origins.get(storage._cdata)


def origin_at(storage_cdata: int) -> Origin | None:
    """`origin_of` the storage that has this `_cdata`."""
    return _origins.get(storage_cdata)


def nothing_away() -> bool:
    """Whether no model is parked or arriving, and no other thread moves anything. It is cheap, and
    may say False in doubt."""
    if not lock.acquire(blocking=False):
        return False
    try:
        return not any(o.is_away and not o.is_result for o in list(_origins.values()))
    finally:
        lock.release()


def parked_storages() -> list[tuple[int, Origin]]:
    """The `_cdata` of each parked storage, and its origin."""
    return [(cdata, origin) for cdata, origin in list(_origins.items()) if origin.is_parked]


def parked_origins() -> Iterator[Origin]:
    """The origin of each parked storage, the longest parked first."""
    return (o for o in list(_origins.values()) if o.is_parked and not o.is_result)


def tensors_of(record: object, part: object, but: Set[int]) -> list[list[torch.Tensor]]:
    """For each parked storage of a model, or of one module of it, the tensors that look into it.

    Without the storages whose `_cdata` is among `but`.
    """
    found = []
    for cdata, origin in list(_origins.items()):
        if cdata in but or not origin.is_parked or origin.is_result:
            continue
        if origin.record is not record and all(ref() is not part for ref in origin.parts):
            continue
        alive = [tensor for ref in origin.tensors if (tensor := ref()) is not None]
        with torch._C.DisableTorchFunctionSubclass():
            alive = [tensor for tensor in alive if tensor.untyped_storage()._cdata == cdata]
        if alive:
            found.append(alive)
    return found


def origin_of_tensor(tensor: torch.Tensor) -> Origin | None:
    """`origin_of` the storage that a tensor looks into; of a wrapper subclass, of an inner one."""
    with torch._C.DisableTorchFunctionSubclass():
        if hasattr(type(tensor), "__tensor_flatten__"):
            names, _context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            origins = (origin_of_tensor(getattr(tensor, name)) for name in names)
            return next((origin for origin in origins if origin is not None), None)
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return None
        return origin_of(tensor.untyped_storage())


def parked_home(tensor: torch.Tensor) -> torch.device | None:
    """The home of a parked tensor, None for one that is not parked."""
    origin = origin_of_tensor(tensor)
    return origin.home if origin is not None and origin.is_parked else None


def place_of(tensor: torch.Tensor) -> torch.device:
    """The device that a tensor's bytes lie on now; a parked tensor itself answers its home."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.device


# Storages that are no arena's: nobody tells when they die, and an address is used again then.
_settled: dict[int, StorageWeakRef] = {}  # by storage._cdata
_results: dict[int, StorageWeakRef] = {}


def settle(storage: torch.UntypedStorage) -> None:
    """Notes that a host storage belongs on the host: it lay there, or its owner has sent it."""
    _note(storage, _settled)


def is_settled(storage: torch.UntypedStorage) -> bool:
    """Whether a host storage belongs on the host."""
    ref = _settled.get(storage._cdata)
    return ref is not None and not ref.expired()


def remember_result(storage: torch.UntypedStorage, origin: Origin) -> None:
    """`remember` for a storage outside the arena."""
    for cdata in _note(storage, _results):
        forget(cdata)
    remember(storage, origin)


def _note(storage: torch.UntypedStorage, among: dict[int, StorageWeakRef]) -> list[int]:
    """Adds a storage, and returns those that are dropped: now and then all that have died.

    A weak reference keeps the address of a dead storage from being used again.
    """
    dead: list[int] = []
    if len(among) >= 64 and len(among) & (len(among) - 1) == 0:
        dead = [cdata for cdata, ref in among.items() if ref.expired()]
        for cdata in dead:
            del among[cdata]
    among[storage._cdata] = StorageWeakRef(storage)
    return dead
