"""Tensors that no module holds, as one model: a video's state, a feature cache, a KV cache."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

import torch
from torch.utils.weak import TensorWeakRef


class LooseTensors:
    """Tensors kept in one place outside of any module. It holds them weakly.

    Attributes:
        place: where they are kept, in words.
    """

    def __init__(self, place: str, tensors: Iterable[torch.Tensor]) -> None:
        self.place = place
        self._references: list[TensorWeakRef] = []
        self.take(tensors)

    def take(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes further tensors, and drops what has died."""
        alive = {id(tensor): tensor for tensor in (*self.tensors().values(), *tensors)}
        self._references = [TensorWeakRef(tensor) for tensor in alive.values()]

    def ids(self) -> set[int]:
        """The `id` of each that is still alive."""
        return {id(tensor) for tensor in self.tensors().values()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that are still alive: what the core parks and restores."""
        alive = [tensor for ref in self._references if (tensor := ref()) is not None]
        return {str(index): tensor for index, tensor in enumerate(alive)}


_groups: list[LooseTensors] = []  # nothing else keeps a group; it keeps no tensor
_lock = threading.RLock()  # a thread that only looks drops groups as well


def group_of(place: str, tensors: Sequence[torch.Tensor]) -> LooseTensors:
    """The group that is kept in this place or has one of these tensors, with all of them in it."""
    ids = set(map(id, tensors))
    with _lock:
        groups = living_groups()
        group = next((g for g in groups if g.place == place or not ids.isdisjoint(g.ids())), None)
        if group is None:
            group = LooseTensors(place, tensors)
            _groups.append(group)
        else:
            group.take(tensors)
        return group


def living_groups() -> list[LooseTensors]:
    """The groups of which a tensor is alive; the others are forgotten."""
    with _lock:
        _groups[:] = [group for group in _groups if group.tensors()]
        return list(_groups)
