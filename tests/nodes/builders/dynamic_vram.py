"""A stand-in for comfy-aimdo: models of ComfyUI's own that give up their pages to what is allocated.

Their memory is not PyTorch's: no counter of the allocator has it, and free VRAM looks low. Here it
is taken off the simulated card's size. The real thing hooks the driver's allocation; here the core's
own are hooked (`hook`), and a node that stands for any other one calls `allocate`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import simcuda
from qmove_core.memory import budget
from qmove_core.transfer import copies

from .careless_nodes import MIB
from .fake_host import FakeHost, ModelPatcher


class DynamicPatcher(ModelPatcher):
    """A model whose pages come as they are used, and go when something else needs the room.

    Attributes:
        asked_to_yield: bytes that ComfyUI has asked it for, in turn.
    """

    def __init__(self, card: DynamicCard, mib: int) -> None:
        super().__init__(nn.Linear(1, 1, device="cpu"))
        self._card, self._size, self.pages = card, mib * MIB, 0
        self.asked_to_yield: list[float] = []

    def is_dynamic(self) -> bool:
        return True

    def model_size(self) -> int:
        return self._size

    def loaded_size(self) -> int:
        return self.pages

    def partially_load(
        self, device: torch.device, extra: float, force_patch_weights: bool = False
    ) -> int:
        before = self.pages
        self.pages = min(self._size, self.pages + self._card.free())
        self._card.resize()
        return self.pages - before

    def partially_unload(self, offload_device: torch.device, memory_to_free: float) -> int:
        self.asked_to_yield.append(memory_to_free)
        return self.give_up(memory_to_free)

    def detach(self, unpatch_all: bool = True) -> None:
        if unpatch_all:
            self.give_up(self.pages)

    def give_up(self, nbytes: float) -> int:
        gone = min(self.pages, int(nbytes))
        self.pages -= gone
        self._card.resize()
        return gone


class DynamicCard:
    """The first simulated GPU, `mib` MiB large, with dynamic models on it."""

    def __init__(self, host: FakeHost, mib: int) -> None:
        self._host, self._size = host, mib * MIB
        self._models: list[DynamicPatcher] = []
        self.resize()

    def load(self, mib: int) -> DynamicPatcher:
        """A dynamic model in ComfyUI's list that has run: its pages fill what was left."""
        patcher = DynamicPatcher(self, mib)
        self._models.append(patcher)
        management = self._host.management
        line = management.LoadedModel(patcher)
        line.model_load()
        management.current_loaded_models.insert(0, line)
        return patcher

    def resize(self) -> None:
        simcuda.set_memory(self._size - sum(model.pages for model in self._models))

    def hook(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From now on what qmove's core allocates takes pages, too."""
        for module in (budget, copies):
            monkeypatch.setattr(module, "empty", self._hooked(module.empty))

    def _hooked(self, empty: Any) -> Any:
        def hooked(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            if torch.device(device) == torch.device("cuda:0"):
                self._evict(math.prod(shape) * dtype.itemsize)
            return empty(*shape, dtype=dtype, device=device)

        return hooked

    def _evict(self, nbytes: int) -> None:
        for model in self._models:
            model.give_up(max(0, nbytes - self.free()))

    def free(self) -> int:
        return torch.cuda.mem_get_info(0)[0]

    def allocate(self, nbytes: int) -> Any:
        """What an allocation does: pages go at the fault, without a word to ComfyUI."""
        self._evict(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
