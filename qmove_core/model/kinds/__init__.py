"""Tensor kinds that need more than their bytes moved, one in a file. Others need no file."""

from __future__ import annotations

import sys
from collections.abc import Set

import torch

from ..holdings import Inventory
from .base import Kind
from .bitsandbytes import BitsAndBytes
from .wrappers import WrapperSubclasses

__all__ = ["Kind", "obstacles", "process_wide_tensors", "refresh"]

_KINDS: tuple[Kind, ...] = (WrapperSubclasses(), BitsAndBytes())


def process_wide_tensors() -> Set[int]:
    """The ids of all tensors that packages share among models."""
    return frozenset(id(tensor) for kind in _present() for tensor in kind.process_wide_tensors())


def obstacles(inventory: Inventory, device: torch.device) -> list[tuple[str, str]]:
    """(name, reason) of everything that would not run on `device`."""
    return [obstacle for kind in _present() for obstacle in kind.obstacles(inventory, device)]


def refresh(inventory: Inventory) -> None:
    """Lets each kind bring what depends on the place in line with where the bytes are now."""
    with torch._C.DisableTorchFunctionSubclass():  # a parked tensor itself answers its home
        for kind in _present():
            kind.refresh(inventory)


def _present() -> list[Kind]:
    return [kind for kind in _KINDS if not kind.module or sys.modules.get(kind.module) is not None]
