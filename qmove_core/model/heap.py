"""What this process holds on accelerators beyond the storages that are known: tensors and modules.

One pass over the objects of the garbage collector; who holds what was found is for `places.py`.
"""

from __future__ import annotations

import gc
import itertools
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..collector import all_objects

MOST_BELOW = 20_000  # objects that are looked at below one holder


class Heap:
    """The accelerator tensors of this process that look into no known storage, and all modules.

    It holds them strongly: keep it no longer than a look lasts.

    Args:
        known: the storages (`_cdata`) that are accounted for.
        also: further classes whose instances are wanted.

    Attributes:
        size: objects that the garbage collector knows.
        visited: objects looked at so far; each costs about 50 ns.
        modules: every `nn.Module`.
        others: the instances of `also`.
    """

    def __init__(self, known: Collection[int], also: tuple[type, ...] = ()) -> None:
        objects = all_objects()
        self.size = self.visited = len(objects)
        classes = set(map(type, objects))
        of_tensors = {cls for cls in classes if issubclass(cls, torch.Tensor)}
        of_modules = {cls for cls in classes if issubclass(cls, nn.Module)}
        of_others = {cls for cls in classes if issubclass(cls, also)}
        wanted = of_tensors | of_modules | of_others
        chosen = list(
            itertools.compress(objects, map(wanted.__contains__, map(type, objects)))
        )  # all in C: there may be millions
        del objects
        self.modules: list[nn.Module] = [obj for obj in chosen if type(obj) in of_modules]
        self.others: list[Any] = [obj for obj in chosen if type(obj) in of_others]
        self._parents: dict[int, nn.Module] = {}
        self._storages: dict[int, list[torch.Tensor]] = {}  # unclaimed, by `_cdata`
        self._tensors: dict[int, int] = {}  # id -> `_cdata`
        self._sort_in(known, [obj for obj in chosen if type(obj) in of_tensors])

    def _sort_in(self, known: Collection[int], tensors: Iterable[torch.Tensor]) -> None:
        with torch._C.DisableTorchFunction():
            for tensor in tensors:
                # A wrapper subclass has none; its inner tensors are here themselves.
                if tensor.device.type in ("cpu", "meta") or not torch._C._has_storage(tensor):
                    continue
                storage = tensor.untyped_storage()
                if storage.device.type in ("cpu", "meta") or not storage.nbytes():
                    continue  # a fake tensor; or one whose owner has emptied it
                if storage._cdata not in known:
                    self._storages.setdefault(storage._cdata, []).append(tensor)
                    self._tensors[id(tensor)] = storage._cdata

    @property
    def own(self) -> list[object]:
        """What of this object refers to the tensors and modules itself."""
        lists = self._storages.values()
        return [self, vars(self), self.modules, self.others, self._parents, self._storages, *lists]

    def claim(self, storages: Iterable[int]) -> None:
        """Takes storages out: they are accounted for now."""
        for cdata in storages:
            for tensor in self._storages.pop(cdata, ()):
                self._tensors.pop(id(tensor), None)

    def is_unclaimed(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._tensors

    def unclaimed(self) -> dict[torch.device, int]:
        """Bytes that are not accounted for, by device."""
        totals: dict[torch.device, int] = {}
        for storage in self._first_storages():
            totals[storage.device] = totals.get(storage.device, 0) + storage.nbytes()
        return totals

    def _first_storages(self) -> Iterator[torch.UntypedStorage]:
        with torch._C.DisableTorchFunction():
            for tensors in self._storages.values():
                yield tensors[0].untyped_storage()

    def largest(self, count: int) -> list[torch.Tensor]:
        """One tensor of each of the largest unclaimed storages, at most `count`."""
        with torch._C.DisableTorchFunction():
            firsts = [tensors[0] for tensors in self._storages.values()]
            firsts.sort(key=lambda tensor: -tensor.untyped_storage().nbytes())
        return firsts[:count]

    def outermost(self, module: nn.Module) -> nn.Module:
        """The module that contains this one and is in no other."""
        if not self._parents:
            for parent in self.modules:
                for child in _children(parent):
                    self._parents[id(child)] = parent
        seen = {id(module)}
        while (above := self._parents.get(id(module))) is not None and id(above) not in seen:
            seen.add(id(above))
            module = above
        return module

    def modules_with_unclaimed(self) -> list[nn.Module]:
        """The outermost modules of which a parameter or buffer is not accounted for."""
        found: dict[int, nn.Module] = {}
        if self._tensors:
            for module in self.modules:
                if any(id(tensor) in self._tensors for tensor in _registered(module)):
                    outermost = self.outermost(module)
                    found[id(outermost)] = outermost
        return list(found.values())

    def below(self, base: object) -> list[torch.Tensor]:
        """The unclaimed tensors that `base` holds, through anything but modules and code."""
        found: dict[int, torch.Tensor] = {}
        seen, stack = {id(base)}, [base]
        while stack and len(seen) < MOST_BELOW:
            obj = stack.pop()
            if isinstance(obj, torch.Tensor) and id(obj) in self._tensors:
                found[id(obj)] = obj
            elif not issubclass(type(obj), (nn.Module, torch.Tensor)):
                for value in referents(obj):
                    if id(value) not in seen:
                        seen.add(id(value))
                        stack.append(value)
        self.visited += len(seen)
        # Views of the same bytes come along.
        cdatas = {self._tensors[key] for key in found}
        return [tensor for cdata in cdatas for tensor in self._storages[cdata]]


def referents(obj: object) -> list[object]:
    """What an object holds, without what leads to all of the process: globals, classes, frames."""
    if isinstance(obj, types.FunctionType):
        return [*(obj.__closure__ or ()), obj.__defaults__, obj.__kwdefaults__]
    if isinstance(obj, (type, types.ModuleType, types.FrameType, types.CodeType)):
        return []
    return gc.get_referents(obj)


def _children(module: nn.Module) -> Iterable[nn.Module | None]:
    """Also of a module whose author has not called `super().__init__()`: it has none."""
    try:
        return module._modules.values()
    except AttributeError:
        return ()


def _registered(module: nn.Module) -> Iterable[object]:
    try:
        return (*module._parameters.values(), *module._buffers.values())
    except AttributeError:
        return ()
