"""Where tensors really lie: a parked one answers its home when it is asked itself."""

from __future__ import annotations

import torch
from torch import nn


def place_of(tensor: torch.Tensor) -> str:
    """The type of the device that has a tensor's bytes."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.device.type


def places(model: nn.Module) -> set[str]:
    """The types of the devices that have the bytes of a model's parameters."""
    return {place_of(parameter) for parameter in model.parameters()}


def parked_names(model: nn.Module) -> set[str]:
    """The names of the parameters whose bytes are on the host."""
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in named if place_of(parameter) == "cpu"}
