"""Turns a layer into another kind of layer, and back if something fails.

The module stays the same object and changes its class, so that its parents, its hooks and all other
references to it stay valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn

from ..attributes import Undo, reorder
from ..class_variants import own_class
from ..integrations.accelerate_dispatch import is_forward_of_its_class
from ..methods import to_method
from ..parking import sleeping


@dataclass
class Change:
    """What one layer will be: its class, its parameters, and the attributes that come and go.

    Attributes:
        order: of the attributes, where it matters.
    """

    module: nn.Module
    cls: type[nn.Module]
    parameters: dict[str, nn.Parameter]
    attributes: dict[str, Any] = field(default_factory=dict)
    dropped: Sequence[str] = ()
    order: Sequence[str] = ()


def carry_out(change: Change, undo: Undo) -> None:
    """Makes a layer what its change says. `undo` gets what makes it the layer that it was."""
    module, attributes = change.module, change.module.__dict__
    undo.note(_reset, module, own_class(module), dict(attributes), dict(module._parameters))
    # accelerate keeps the forward that its hook replaces
    forwards = [key for key, value in attributes.items() if is_forward_of_its_class(value, module)]
    _exchange_class(module, change.cls)
    for name in change.dropped:
        attributes.pop(name, None)
    attributes.update(change.attributes)
    attributes.update({name: MethodType(change.cls.forward, module) for name in forwards})
    reorder(attributes, change.order)
    module._parameters.update(change.parameters)


def _reset(
    module: nn.Module,
    cls: type[nn.Module],
    attributes: dict[str, Any],
    parameters: dict[str, nn.Parameter | None],
) -> None:
    _exchange_class(module, cls)
    module._parameters.clear()
    module._parameters.update(parameters)
    module.__dict__.clear()
    module.__dict__.update(attributes)


def _exchange_class(module: nn.Module, cls: type[nn.Module]) -> None:
    enabled = to_method.is_enabled(module)
    if enabled:
        to_method.disable_to(module)
    sleeping.exchange_class(module, lambda own: cls)
    if enabled:
        to_method.enable_to(module)
