"""Turns a layer into another kind of layer, and back if that was not to be.

The module stays the same object and changes its class, so that its parents, its hooks and whoever else refers to it
keep it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

from ..class_variants import own_class
from ..methods import to_method
from ..parking import sleeping


@dataclass
class Change:
    """What one layer will be: its class, its parameters, and the attributes that come and go."""

    module: nn.Module
    cls: type[nn.Module]
    parameters: dict[str, nn.Parameter]
    attributes: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Before:
    """A layer as it was, to undo a change."""

    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    parameters: dict[str, nn.Parameter | None]

    @classmethod
    def of(cls, module: nn.Module) -> Before:
        return cls(module, own_class(module), dict(module.__dict__), dict(module._parameters))


def carry_out(changes: Iterable[Change]) -> None:
    """Makes each layer what its change says."""
    for change in changes:
        module = change.module
        _exchange_class(module, change.cls)
        for name in change.dropped:
            module.__dict__.pop(name, None)
        module.__dict__.update(change.attributes)
        module._parameters.update(change.parameters)
        for (
            name,
            value,
        ) in module.__dict__.items():  # accelerate keeps the forward that its hook replaces
            if isinstance(value, MethodType) and value.__self__ is module and _is_forward(value):
                module.__dict__[name] = MethodType(change.cls.forward, module)


def _is_forward(method: MethodType) -> bool:
    return getattr(method.__func__, "__name__", "") == "forward"


def undo(befores: Iterable[Before]) -> None:
    """Makes each layer what it was. Layers that did not change stay as they are."""
    for before in befores:
        _exchange_class(before.module, before.cls)
        before.module._parameters.clear()
        before.module._parameters.update(before.parameters)
        before.module.__dict__.clear()
        before.module.__dict__.update(before.attributes)


def _exchange_class(module: nn.Module, cls: type[nn.Module]) -> None:
    enabled = to_method.is_enabled(module)
    if enabled:
        to_method.disable_to(module)
    sleeping.exchange_class(module, lambda own: cls)
    if enabled:
        to_method.enable_to(module)
