"""``torch.UntypedStorage`` on ``cuda``: a CPU build's storages do not know the device, so byte
tensors serve them."""

from __future__ import annotations

from typing import Any

import torch


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """A uint8 tensor over the whole storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def install() -> None:
    """Teaches ``torch.UntypedStorage`` to be made, resized, filled and read on ``cuda``."""
    cls: Any = torch.UntypedStorage
    new, resize, fill, getitem, setitem = (
        cls.__new__,
        cls.resize_,
        cls.fill_,
        cls.__getitem__,
        cls.__setitem__,
    )

    def __new__(klass: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
        wanted = torch.device(device) if device is not None else torch.get_default_device()
        if wanted.type != "cuda" or "allocator" in kwargs:
            return (
                new(klass, *args, **kwargs)
                if device is None
                else new(klass, *args, device=device, **kwargs)
            )
        (content,) = args or (kwargs.get("size", 0),)
        if isinstance(content, int):
            return torch.empty(content, dtype=torch.uint8, device=wanted).untyped_storage()
        return torch.tensor(list(content), dtype=torch.uint8, device=wanted).untyped_storage()

    def resize_(self: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return resize(self, size)
        torch.ops.simcuda.resize_storage(_bytes(self), size)
        return self

    def fill_(self: torch.UntypedStorage, value: int) -> torch.UntypedStorage:
        if self.device.type != "cuda":
            return fill(self, value)
        _bytes(self).fill_(value)
        return self

    def __getitem__(self: torch.UntypedStorage, index: Any) -> Any:
        if self.device.type != "cuda":
            return getitem(self, index)
        found = _bytes(self)[index]
        return found.untyped_storage() if isinstance(index, slice) else found.item()

    def __setitem__(self: torch.UntypedStorage, index: Any, value: Any) -> None:
        if self.device.type != "cuda":
            return setitem(self, index, value)
        _bytes(self)[index] = value

    for function in (__new__, resize_, fill_, __getitem__, __setitem__):
        setattr(cls, function.__name__, staticmethod(function) if function is __new__ else function)
