"""What a test compares before and after a move: bytes, tensors and everything that hangs on a
model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def snapshot(model: object) -> dict[str, tuple[Any, ...]]:
    """Everything a round trip must preserve, by name of each holding: device, bytes, shapes,
    aliases, identities, attributes.

    Tensors of wrapper subclasses have no bytes of their own; they are listed after the holdings.
    """
    from qmove_core import inventory

    held = inventory(model)
    result: dict[str, tuple[Any, ...]] = {}
    for holding in held.holdings:
        content = torch.empty(0, dtype=torch.uint8, device=holding.device).set_(
            holding.storage, 0, (holding.nbytes,), (1,)
        )
        tensors = tuple(_outside(tensor) for tensor in holding.tensors)
        result[holding.name] = (
            str(holding.device),
            bytes(content.cpu().numpy().tobytes()),
            tensors,
            tuple(holding.names),
        )
    for name, wrapper in held.wrappers:
        result[f"{name} as a whole"] = (str(wrapper.device), _outside(wrapper))
    return result


def _outside(t: torch.Tensor) -> tuple[Any, ...]:
    """What a tensor object is apart from its bytes and its device."""
    with torch._C.DisableTorchFunctionSubclass():
        # PyTorch sets the ones left out anew each time a jagged tensor is built or asked for its
        # size.
        attributes = {
            name: id(value)
            for name, value in t.__dict__.items()
            if not name.startswith(("_sym_", "_dynamo_"))
        }
        geometry = (t.dtype, t.shape, t.stride(), t.storage_offset(), t.layout)
        return (id(t), type(t), geometry, t.requires_grad, t.is_leaf, t.is_inference(), attributes)


def contents(model: object) -> dict[str, bytes]:
    """The bytes of every storage, wherever it is."""
    return {
        name: content[1]
        for name, content in snapshot(model).items()
        if isinstance(content[1], bytes)
    }


def traces(model: nn.Module, identities: bool = True) -> list[tuple[Any, ...]]:
    """Class, attributes and hooks of every module, and the attribute names of every parameter.

    With `identities=False` attributes and hooks are named and counted only, as a copy has them too.
    """
    modules = [
        (
            type(module),
            {name: id(value) if identities else None for name, value in vars(module).items()},
            *(dict(hooks) if identities else len(hooks) for hooks in _hooks_of(module)),
        )
        for module in model.modules()
    ]
    return [*modules, *((type(p), sorted(vars(p))) for p in model.parameters())]


def _hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_pre_hooks, module._forward_hooks
