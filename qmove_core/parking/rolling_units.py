"""A part of a model that comes and goes, and the state of its storages: home, parked or arriving.
Nothing is noted of it, the storages tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .. import homes
from ..memory.mirrors import Mirror
from ..model.holdings import Holding, Inventory
from .layer_order import LayerGroup


class Unit:
    """A layer group that comes and goes. It is what wakes its modules."""

    gives_way = False

    def __init__(
        self,
        use: Callable[[Sequence[Unit]], object],
        group: LayerGroup,
        holdings: Sequence[Holding],
        held: Inventory,
    ) -> None:
        self._use, self.name = use, group.name
        self.modules, self.holdings = group.modules, holdings
        self.held = held
        self.kept: list[tuple[Holding, Mirror]] = []  # host copies that must not be given up

    @property
    def waits(self) -> bool:
        """Whether its tensors are under way."""
        return any(map(is_arriving, self.holdings))

    def __call__(self, module: nn.Module) -> None:
        self._use([self])

    @property
    def is_there(self) -> bool:
        """Whether any of it takes VRAM."""
        return any(is_home(h) or is_arriving(h) for h in self.holdings)


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


def storage(holding: Holding) -> torch.UntypedStorage:
    """Where the bytes are now, also while they are under way."""
    return storage_of(holding.tensors[0])


def is_home(holding: Holding) -> bool:
    return storage(holding).device.type != "cpu"


def is_arriving(holding: Holding) -> bool:
    origin = homes.origin_of(storage(holding))
    return origin is not None and origin.arrival is not None


def is_parked(holding: Holding) -> bool:
    origin = homes.origin_of(storage(holding))
    return origin is not None and origin.is_parked
