"""Finds the models in what flows on a wire: an opaque model, a pipeline, a dict, a list, or ComfyUI's own MODEL, CLIP or VAE.

The search goes from object to object and stops at modules and at ComfyUI's patchers, so it is cheap however big the models are.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import comfy
from ..contract import HostEntry
from .adopted import adopted_of, can_be_adopted

log = logging.getLogger("qmove")

MOST_OBJECTS = 20_000  # a wire may carry a list of a million numbers; no pipeline has this many objects outside its modules


@dataclass
class Found:
    """Attributes:
    modules: outermost modules that are not ComfyUI's own.
    patchers: ComfyUI's own models, which only ComfyUI moves.
    keepers: objects that keep accelerator tensors of their own, outside of any module.
    seen: ids of all objects that were met.
    """

    modules: list[nn.Module] = field(default_factory=list)
    patchers: list[HostEntry] = field(default_factory=list)
    keepers: list[Any] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    @property
    def has_models(self) -> bool:
        return bool(self.modules or self.patchers or self.keepers)


def find_models(values: Iterable[object]) -> Found:
    """Searches values and everything they hold."""
    found = Found()
    keepers: dict[int, Any] = {}
    patcher_class = comfy.model_patcher_class()
    alive: list[object] = []  # an id may be used again once its object is gone
    stack: list[tuple[object, object]] = [(value, None) for value in values]
    while stack:
        obj, keeper = stack.pop()
        cls: Any = type(obj)
        if id(obj) in found.seen or _is_plain(cls):
            continue
        if len(found.seen) >= MOST_OBJECTS:
            log.debug(
                "stopped the search for models in a value of more than %d objects", MOST_OBJECTS
            )
            break
        found.seen.add(id(obj))
        alive.append(obj)
        if isinstance(obj, torch.Tensor):
            if keeper is not None and obj.device.type not in ("cpu", "meta"):
                keepers[id(keeper)] = keeper
        elif isinstance(obj, nn.Module):
            found.modules.append(obj)
        elif patcher_class is not None and isinstance(obj, patcher_class):
            found.patchers += _with_additional(obj)
        elif isinstance(obj, Mapping):
            stack += [(value, keeper) for value in _values(obj)]
        elif isinstance(obj, (list, tuple, set, frozenset)):
            stack += [(value, keeper) for value in obj]
        else:
            keeper = obj if can_be_adopted(obj) else keeper
            stack += [(value, keeper) for value in _attributes(obj)]
    found.modules = _outermost(_not_the_hosts(found.modules, found.patchers))
    found.keepers = list(keepers.values())
    return found


def _with_additional(patcher: Any) -> list[HostEntry]:
    """A patcher, and those that travel with it (a ControlNet's, a hook's)."""
    nested = getattr(patcher, "get_nested_additional_models", None)
    return [patcher, *(nested() if nested is not None else patcher.model_patches_models())]


def _not_the_hosts(modules: list[nn.Module], patchers: list[HostEntry]) -> list[nn.Module]:
    """Leaves out modules that ComfyUI manages itself: a VAE object holds its module beside the patcher of it."""
    unknown = [module for module in modules if adopted_of(module) is None]
    if not unknown:
        return modules
    host = comfy.model_management()
    patcher_class = comfy.model_patcher_class()
    loaded = [line.model for line in host.current_loaded_models] if host is not None else []
    own = patchers + [
        x
        for x in loaded
        if x is not None and patcher_class is not None and isinstance(x, patcher_class)
    ]
    roots = [patcher.model for patcher in own if isinstance(patcher.model, nn.Module)]
    managed = {
        id(module)
        for root in {id(root): root for root in roots}.values()
        for module in root.modules()
    }
    return [module for module in modules if id(module) not in managed]


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    if len(modules) < 2:
        return modules
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if id(module) not in inner]


def _values(mapping: Mapping[Any, Any]) -> Iterable[object]:
    # A mapping that is no dict may load what it is asked for (accelerate's offloaded weights).
    return (
        list(mapping.values())
        if isinstance(mapping, dict)
        else list(vars(mapping).values())
        if hasattr(mapping, "__dict__")
        else []
    )


def _attributes(obj: Any) -> list[object]:
    if isinstance(obj, functools.partial):
        return [obj.func, *obj.args, *obj.keywords.values()]
    if isinstance(obj, types.MethodType):
        return [obj.__self__]
    cls: Any = type(obj)
    values = list(getattr(obj, "__dict__", {}).values())
    if isinstance(obj, types.FunctionType):
        for cell in obj.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # a variable that is not assigned yet
                continue
    return values + [getattr(obj, slot, None) for slot in _slots(cls)]


@functools.cache
def _slots(cls: type) -> tuple[str, ...]:
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names.extend([slots] if isinstance(slots, str) else slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


_PLAIN = (
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        range,
        slice,
        type,
        types.ModuleType,
        types.CodeType,
    ),
    *(
        types.BuiltinFunctionType,
        property,
        torch.dtype,
        torch.device,
        torch.Size,
        torch.Generator,
        torch.UntypedStorage,
    ),
)
# Objects of these hold locks, sockets, pictures or the host itself, never a model.
_PLAIN_PACKAGES = frozenset(
    {
        "numpy",
        "PIL",
        "threading",
        "_thread",
        "logging",
        "enum",
        "asyncio",
        "aiohttp",
        "concurrent",
        "queue",
        "server",
        "re",
        "av",
    }
)


@functools.cache
def _is_plain(cls: type) -> bool:
    return issubclass(cls, _PLAIN) or cls.__module__.partition(".")[0] in _PLAIN_PACKAGES
