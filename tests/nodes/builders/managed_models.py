"""Models that something else moves while they run: block swap, mmgp, hooks of accelerate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .careless_nodes import model_of

GPU = torch.device("cuda:0")


class _Run(nn.Module):
    """Four layers; `manage` says what happens around each."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(model_of(mib, "cpu"))
        self.in_features = self.layers[0].in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, layer in enumerate(self.layers):
            self.before(index)
            x = layer(x)
            self.after(index)
        return x

    def before(self, index: int) -> None:
        pass

    def after(self, index: int) -> None:
        pass


class SwapsBlocks(_Run):
    """The last two layers live in RAM, and are on the GPU while they run, as video packs do it."""

    def __init__(self, mib: int, blocks_to_swap: int = 2) -> None:
        super().__init__(mib)
        self.blocks_to_swap = blocks_to_swap
        for layer in self.layers[: 4 - blocks_to_swap]:
            layer.to(GPU)

    def before(self, index: int) -> None:
        self.layers[index].to(GPU)

    def after(self, index: int) -> None:
        if index >= 4 - self.blocks_to_swap:
            self.layers[index].to("cpu")


class SwapsBlocksUnseen(SwapsBlocks):
    """The same, and nothing on it says so."""

    def __init__(self, mib: int) -> None:
        super().__init__(mib)
        self.count, self.blocks_to_swap = self.blocks_to_swap, 0

    def after(self, index: int) -> None:
        if index >= 4 - self.count:
            self.layers[index].to("cpu")


class EmptiesBlocks(_Run):
    """The last two layers keep their bytes elsewhere; their storages are emptied and filled."""

    def __init__(self, mib: int) -> None:
        super().__init__(mib)
        self.to(GPU)
        self.kept = {i: [p.data.cpu() for p in self.layers[i].parameters()] for i in (2, 3)}
        for index in self.kept:
            self.after(index)

    def before(self, index: int) -> None:
        pairs = zip(self.layers[index].parameters(), self.kept.get(index, ()), strict=False)
        for parameter, bytes_of in pairs:
            parameter.untyped_storage().resize_(bytes_of.nbytes)
            parameter.data.copy_(bytes_of)

    def after(self, index: int) -> None:
        for parameter in self.layers[index].parameters() if index in self.kept else ():
            parameter.untyped_storage().resize_(0)


class LikeMmgp(_Run):
    """Its bytes lie in a bank; the parameters are given GPU copies of them while a layer runs."""

    def __init__(self, mib: int) -> None:
        super().__init__(mib)
        self._mm_manager = object()
        self.bank = {p: p.data for p in self.parameters()}
        for parameter in self.layers[0].parameters():  # the budget allows for one layer
            parameter.data = self.bank[parameter].to(GPU)

    def before(self, index: int) -> None:
        for parameter in self.layers[index].parameters():
            parameter.data = self.bank[parameter].to(GPU)

    def after(self, index: int) -> None:
        for parameter in self.layers[index].parameters() if index else ():
            parameter.data = self.bank[parameter]


def offloaded_by_accelerate(mib: int) -> nn.Module:
    from accelerate import cpu_offload

    model = _Run(mib)
    cpu_offload(model, execution_device=GPU)
    return model


def offloaded_whole_by_accelerate(mib: int) -> nn.Module:
    from accelerate import cpu_offload_with_hook

    model, hook = cpu_offload_with_hook(_Run(mib), execution_device=GPU)
    model.offload_hook = hook
    return model


MARKED: dict[str, Callable[[int], Any]] = {
    "block swap": SwapsBlocks,
    "mmgp": LikeMmgp,
    "accelerate's hooks": offloaded_by_accelerate,
    "accelerate's hook for a whole model": offloaded_whole_by_accelerate,
}
ALL = MARKED | {"block swap, unseen": SwapsBlocksUnseen, "emptied blocks": EmptiesBlocks}
