"""Weights whose bytes somebody has taken away (`storage.resize_(0)`): careless purge nodes do."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def emptied_in(model: object) -> list[str]:
    """The names of the parameters and buffers of a module that have no bytes any more."""
    if not isinstance(model, nn.Module):
        return []
    return [name for name, tensor in _registered(model) if is_emptied(tensor)]


def is_emptied(tensor: torch.Tensor) -> bool:
    """Whether a tensor that should have bytes looks into a storage that has none."""
    with torch._C.DisableTorchFunction():
        return (
            torch._C._has_storage(tensor)
            and tensor.device.type != "meta"
            and tensor.numel() > 0
            and tensor.untyped_storage().nbytes() == 0
        )


def _registered(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
