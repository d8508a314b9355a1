"""Every attribute of every object that a model is made of, however deep: what must be the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# PyTorch sets these anew when a tensor is built or compiled.
_ITS_OWN = ("_sym_", "_dynamo_", "_specialize_on")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type)


def attributes_of(model: Any) -> dict[str, Any]:
    """By the path of each object its class, the names of its attributes in their order, and what
    they are: plain values by value, objects by identity."""
    found: dict[str, Any] = {}
    pending, seen = [("model", model)], set[int]()
    with torch._C.DisableTorchFunctionSubclass():
        while pending:
            path, thing = pending.pop()
            if id(thing) in seen or not _has_parts(thing):
                continue
            seen.add(id(thing))
            parts = _parts_of(thing)
            found[path] = (
                id(thing),
                type(thing),
                [(name, part if isinstance(part, _PLAIN) else id(part)) for name, part in parts],
            )
            pending += [(f"{path}.{name}", part) for name, part in parts]
    return found


def _has_parts(thing: Any) -> bool:
    if isinstance(thing, (dict, list, tuple, nn.Module, torch.Tensor)):
        return True
    return hasattr(thing, "__dict__") and not callable(thing) and not _is_a_library(thing)


def _is_a_library(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] in ("builtins", "types", "_thread", "weakref")


def _parts_of(thing: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    if isinstance(thing, dict):
        parts += [(repr(key), value) for key, value in thing.items()]
    elif isinstance(thing, (list, tuple)):
        parts += [(str(index), value) for index, value in enumerate(thing)]
    named = getattr(thing, "__dict__", None) or {}
    return parts + [(name, value) for name, value in named.items() if not name.startswith(_ITS_OWN)]
