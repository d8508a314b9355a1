"""A weak reference to anything that may be a model, also to what allows none: a dict, a list."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef

from ..slots import slots_of


class Weakly:
    """Refers to a model and keeps nothing of it alive."""

    __slots__ = ("_is_container", "_refs")

    def __init__(self, model: object) -> None:
        self._is_container = not _allows_weak_reference(model)
        self._refs = [
            (name, TensorWeakRef(leaf) if isinstance(leaf, torch.Tensor) else weakref.ref(leaf))
            for name, leaf in _leaves(model)
        ]

    def __call__(self) -> Any:
        """The model, or a new dict of what is left of a container; None when it is gone."""
        if not self._is_container:
            return self._refs[0][1]()
        return {name: leaf for name, ref in self._refs if (leaf := ref()) is not None} or None

    def is_for(self, model: object) -> bool:
        """Whether it refers to this object: for a container, whether it holds all that is left."""
        if self._is_container != (not _allows_weak_reference(model)):
            return False
        own = self()
        return (
            own is model
            if not self._is_container
            else own is not None and ids_of(own) <= ids_of(model)
        )


def ids_of(model: object) -> frozenset[int]:
    """The `id` of each object that makes up a model: of a module its own, of a list its items'."""
    return frozenset(id(leaf) for _name, leaf in _leaves(model))


def _leaves(
    obj: object, name: str = "", within: frozenset[int] = frozenset()
) -> Iterator[tuple[str, Any]]:
    """The objects that make up a model and allow a weak reference, with their names."""
    if _allows_weak_reference(obj):
        yield name, obj
        return
    if id(obj) in within:
        return
    if isinstance(obj, dict):
        # A key that is no name may be an object that must not be kept alive by its name: an
        # optimizer's state has parameters for keys.
        items = [
            (f"{name}.{key}" if name else key, value)
            if isinstance(key, str)
            else (f"{name}[{key if isinstance(key, int) else f'#{index}'}]", value)
            for index, (key, value) in enumerate(obj.items())
        ]
    elif isinstance(obj, (list, tuple, set, frozenset)):
        items = [(f"{name}[{index}]", value) for index, value in enumerate(obj)]
    else:
        prefix = f"{name}." if name else ""
        slots = slots_of(type(obj))  # type: ignore[arg-type]
        items = [(prefix + slot, getattr(obj, slot, None)) for slot in slots]
    for item_name, value in items:
        yield from _leaves(value, item_name, within | {id(obj)})


def _allows_weak_reference(obj: object) -> bool:
    return isinstance(obj, torch.Tensor) or type(obj).__weakrefoffset__ != 0
