"""Where host storages came from: the state that all of qmove shares, and the lock of every move."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.weak import TensorWeakRef

# Held for the whole of each move, so that two threads never move at once. Finalizers never take it.
lock = threading.RLock()


@dataclass(slots=True)
class Origin:
    """Where a host storage came from.

    Attributes:
        home: the device it goes back to.
        nbytes: size of the storage.
        record: the parked model it belongs to (`parking/records.py`), opaque here; None for a model
            that was moved to the CPU to run there.
        outsiders: tensor objects outside the model that look into the storage and moved with it.
        digest: of the bytes that were parked, where it was taken.
    """

    home: torch.device
    nbytes: int
    record: object | None
    outsiders: list[TensorWeakRef] = field(default_factory=list)
    digest: int | None = None

    def outsiders_on(self, storage: torch.UntypedStorage) -> list[torch.Tensor]:
        """Those outsiders that are alive and still look into the storage."""
        alive = [tensor for ref in self.outsiders if (tensor := ref()) is not None]
        return [tensor for tensor in alive if tensor.untyped_storage()._cdata == storage._cdata]


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


def parked_origins() -> Iterator[Origin]:
    """The origin of each parked storage, the longest parked first."""
    return (origin for origin in list(_origins.values()) if origin.record is not None)


def parked_home(tensor: torch.Tensor) -> torch.device | None:
    """The home of a parked tensor, None for one that is not parked."""
    with torch._C.DisableTorchFunctionSubclass():
        if hasattr(type(tensor), "__tensor_flatten__"):
            names, _context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            homes = (parked_home(getattr(tensor, name)) for name in names)
            return next((home for home in homes if home is not None), None)
        origin = origin_of(tensor.untyped_storage())
    return origin.home if origin is not None and origin.record is not None else None
