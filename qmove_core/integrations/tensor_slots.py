"""The places of a model where tensors are registered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(slots=True)
class Slot:
    """A name in a module under which a parameter or buffer is registered.

    Attributes:
        module: the module that has the tensor.
        registered, name: its dictionary of parameters or of buffers, and the name in it.
        full_name: the name in the whole model.
        tensor: what was registered there when the slot was listed.
        hook, key: the hook of accelerate that keeps the values, and their key in its `weights_map`;
            if there is one.
    """

    module: nn.Module
    registered: dict[str, torch.Tensor | None]
    name: str
    full_name: str
    tensor: torch.Tensor
    hook: Any = None
    key: str = ""

    @property
    def is_buffer(self) -> bool:
        return self.registered is self.module._buffers

    def put(self, tensor: torch.Tensor | None) -> None:
        """Past `nn.Module.__setattr__`, which may wrap or refuse a tensor."""
        self.registered[self.name] = tensor

    def get(self) -> torch.Tensor | None:
        """The tensor object under the name now; None if there is none any more."""
        return self.registered.get(self.name)


def registered_slots(modules: Mapping[str, nn.Module]) -> Iterator[Slot]:
    """Every slot of these modules (by name) that has a tensor, not those of their submodules."""
    for prefix, module in modules.items():
        registries: tuple[Any, ...] = (module._parameters, module._buffers)
        for registered in registries:
            for name, tensor in registered.items():
                if tensor is not None:
                    full_name = f"{prefix}.{name}" if prefix else name
                    yield Slot(module, registered, name, full_name, tensor)
