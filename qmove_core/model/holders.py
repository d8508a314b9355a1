"""Finds who else holds a storage that a move should have freed.

The search goes through all objects that the garbage collector knows, so it is only made for a
storage that outlives its move.
"""

from __future__ import annotations

import gc
import types
from collections.abc import Collection
from dataclasses import dataclass

import torch

from ..collector import all_objects


@dataclass(frozen=True)
class Straggler:
    """Bytes that stayed on a device because something that qmove cannot move holds them.

    Attributes:
        name: of the model's tensor whose storage it is.
        device, nbytes: where it lies, and its size.
        holders: what holds it, in words.
    """

    name: str
    device: torch.device
    nbytes: int
    holders: tuple[str, ...]


def tensors_on(storages: Collection[int]) -> dict[int, list[torch.Tensor]]:
    """All tensor objects of this process that look into these storages (`_cdata`), by storage."""
    found: dict[int, dict[int, torch.Tensor]] = {}
    with torch._C.DisableTorchFunction():
        for obj in all_objects():
            if not issubclass(type(obj), torch.Tensor) or not torch._C._has_storage(obj):
                continue
            cdata = obj.untyped_storage()._cdata
            if cdata in storages:
                found.setdefault(cdata, {})[id(obj)] = obj
                # A base may have had no Python object until now.
                if not obj.is_inference() and obj._base is not None:
                    found[cdata][id(obj._base)] = obj._base
    return {cdata: list(tensors.values()) for cdata, tensors in found.items()}


def holders_of(storage_cdata: int) -> tuple[str, ...]:
    """Describes what holds a storage that no tensor object looks into any more."""
    storages = [obj for obj in all_objects() if issubclass(type(obj), torch.UntypedStorage)]
    storage = next((storage for storage in storages if storage._cdata == storage_cdata), None)
    del storages  # it would be a holder itself
    described: set[str] = set()
    # No comprehension: the cell of its variable would be a holder as well.
    for referrer in gc.get_referrers(storage) if storage is not None else ():
        if not _is_our_own_frame(referrer):
            described.add(f"{_describe(referrer, storage)} (as an UntypedStorage)")
    return tuple(sorted(described)) or _IN_CPP


_IN_CPP = (
    "PyTorch itself, in C++ (an autograd graph, a CUDA graph, or a view whose tensor is gone)",
)


def _is_our_own_frame(referrer: object) -> bool:
    if not isinstance(referrer, types.FrameType):
        return False
    package = __name__.partition(".")[0]
    return str(referrer.f_globals.get("__name__", "")).startswith(package)


def _describe(referrer: object, held: object) -> str:
    if isinstance(referrer, types.FrameType):
        code = referrer.f_code
        return f"a local variable of {code.co_name}() in {code.co_filename}:{referrer.f_lineno}"
    if isinstance(referrer, (list, tuple, set)):
        return f"a {type(referrer).__name__} of {len(referrer)}"
    attributes = referrer if isinstance(referrer, dict) else getattr(referrer, "__dict__", {})
    key = next((key for key, value in attributes.items() if value is held), "?")
    owner: object = referrer
    if isinstance(referrer, dict):
        owners = gc.get_referrers(referrer)
        owner = next((o for o in owners if getattr(o, "__dict__", None) is referrer), None)
    if isinstance(owner, types.ModuleType):
        return f"the global {key!r} of module {owner.__name__}"
    if owner is None:
        return f"a dict, under {key!r}"
    return f"the attribute {key!r} of a {type(owner).__qualname__}"
