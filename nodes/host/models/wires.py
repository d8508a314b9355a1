"""Finds the models on a wire: an opaque model, a pipeline, a dict, or a MODEL, CLIP or VAE.

The search goes from object to object and stops at modules and at ComfyUI's patchers, so its cost
does not grow with the size of a model.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qmove_core import for_hosts

from .. import comfy
from ..contract import HostEntry
from . import residency
from .adopted import adopted_of, can_be_adopted

log = logging.getLogger("qmove")

# A wire may carry a million numbers; no pipeline has this many objects outside its modules.
MOST_OBJECTS = 20_000


@dataclass
class Found:
    """Attributes:
    modules: outermost modules that are not ComfyUI's own.
    patchers: ComfyUI's own models, which only ComfyUI moves.
    tensor_owners: objects that hold accelerator tensors of their own, outside of any module.
    loose: tensors on an accelerator, or parked, in dicts and lists: no object owns them.
    seen: ids of all objects that were met.
    """

    modules: list[nn.Module] = field(default_factory=list)
    patchers: list[HostEntry] = field(default_factory=list)
    tensor_owners: list[Any] = field(default_factory=list)
    loose: list[torch.Tensor] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def all(self) -> list[Any]:
        return [*self.modules, *self.patchers, *self.tensor_owners]


def find_models(values: Iterable[object]) -> Found:
    """Searches values and everything they hold."""
    found = Found()
    # Most wires carry lists of numbers, texts and the like: a look at those costs next to nothing.
    flat = [item for value in values for item in (value if type(value) is list else (value,))]
    stack: list[tuple[object, object]] = [(x, None) for x in flat if not _is_plain(type(x))]
    if not stack:
        return found
    owners: dict[int, Any] = {}
    patcher_class = comfy.model_patcher_class()
    # Caches for this search only: they would keep classes alive that were made for one model.
    plain: dict[type, bool] = {}
    slots_of: dict[type, Collection[str]] = {}
    alive: list[object] = []  # an id may be used again once its object is gone
    while stack:
        obj, owner = stack.pop()
        cls: Any = type(obj)
        if cls not in plain:
            plain[cls] = _is_plain(cls)
        if plain[cls] or id(obj) in found.seen:
            continue
        if len(found.seen) >= MOST_OBJECTS:
            log.debug("stopped looking for models after %d objects", MOST_OBJECTS)
            break
        found.seen.add(id(obj))
        alive.append(obj)
        if isinstance(obj, torch.Tensor):
            if for_hosts.parked_home(obj) is None and obj.device.type in ("cpu", "meta"):
                continue
            if owner is None:
                found.loose.append(obj)
            else:
                owners[id(owner)] = owner
        elif isinstance(obj, nn.Module):
            found.modules.append(obj)
        elif patcher_class is not None and isinstance(obj, patcher_class):
            found.patchers += _with_additional(obj)
        elif isinstance(obj, dict):
            stack += [(value, owner) for value in obj.values()]
        elif isinstance(obj, Mapping):
            # Its items may be loaded when they are read (accelerate's offloaded weights).
            stack += [(value, owner) for value in getattr(obj, "__dict__", {}).values()]
        elif isinstance(obj, (list, tuple, set, frozenset)):
            stack += [(value, owner) for value in obj]
        else:
            owner = obj if can_be_adopted(obj) else owner
            if cls not in slots_of:
                slots_of[cls] = for_hosts.slots_of(cls)
            slots = [getattr(obj, slot, None) for slot in slots_of[cls]]
            stack += [(value, owner) for value in (*_attributes(obj), *slots)]
    found.modules = _outermost(_not_the_hosts(found.modules, found.patchers))
    found.tensor_owners = list(owners.values())
    return found


def _with_additional(patcher: Any) -> list[HostEntry]:
    """A patcher, and those that travel with it (a ControlNet's, a hook's)."""
    nested = getattr(patcher, "get_nested_additional_models", patcher.model_patches_models)
    return [patcher, *nested()]


def _not_the_hosts(modules: list[nn.Module], patchers: list[HostEntry]) -> list[nn.Module]:
    """Leaves out what ComfyUI manages itself: a VAE object holds its module beside its patcher."""
    if all(adopted_of(module) is not None for module in modules):
        return modules
    patcher_class = comfy.model_patcher_class()
    if patcher_class is not None:
        own = residency.hosts_own_entries()
        patchers = patchers + [entry for entry in own if isinstance(entry, patcher_class)]
    roots = {id(patcher.model): patcher.model for patcher in patchers}.values()
    managed = {id(m) for root in roots if isinstance(root, nn.Module) for m in root.modules()}
    return [module for module in modules if id(module) not in managed]


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    if len(modules) < 2:
        return modules
    inner = {id(child) for module in modules for child in module.modules() if child is not module}
    return [module for module in modules if id(module) not in inner]


def _attributes(obj: Any) -> list[object]:
    if isinstance(obj, functools.partial):
        return [obj.func, *obj.args, *obj.keywords.values()]
    if isinstance(obj, types.MethodType):
        return [obj.__self__]
    values = list(getattr(obj, "__dict__", {}).values())
    if isinstance(obj, types.FunctionType):
        for cell in obj.__closure__ or ():
            try:
                values.append(cell.cell_contents)
            except ValueError:  # a variable that is not assigned yet
                continue
    return values


# fmt: off
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, bytearray, range, slice, type, property,
    types.ModuleType, types.CodeType, types.BuiltinFunctionType,
    torch.dtype, torch.device, torch.Size, torch.Generator, torch.UntypedStorage,
)
# Objects of these hold locks, sockets, pictures or ComfyUI itself, never a model.
_PLAIN_PACKAGES = frozenset({
    "numpy", "PIL", "threading", "_thread", "logging", "enum", "asyncio", "aiohttp", "concurrent",
    "queue", "server", "re", "av",
})
# fmt: on


def _is_plain(cls: type) -> bool:
    return issubclass(cls, _PLAIN) or cls.__module__.partition(".")[0] in _PLAIN_PACKAGES
