"""accelerate's dispatch hooks: which weights they keep elsewhere, and how they are taken off and put back as the very same objects.

accelerate's own `remove_hook_from_module` calls `detach_hook`, which loads back only what was real before the dispatch. In a
model that transformers loaded nothing was: the meta tensors remain, and the hooks that knew where the values lie are gone.
So here hooks are only set aside: their attributes leave the modules, and come back as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Slot:
    """A name in a module under which a meta tensor stands whose values a hook keeps elsewhere.

    Attributes:
        registered, name: the module's dictionary of parameters or of buffers, and the name in it.
        full_name: the name in the whole model.
        tensor: the meta tensor.
        hook: the hook that keeps the values.
        key: under which its `weights_map` has them.
    """

    registered: dict[str, torch.Tensor | None]
    name: str
    full_name: str
    tensor: torch.Tensor
    hook: Any
    key: str

    def put(self, tensor: torch.Tensor | None) -> None:
        """Places a tensor object under the name, past `nn.Module.__setattr__`, which may wrap or refuse it."""
        self.registered[self.name] = tensor

    def get(self) -> torch.Tensor | None:
        """The tensor object under the name now; None if there is none any more."""
        return self.registered.get(self.name)


@dataclass
class Dispatch:
    """Hooks that were taken off, with all that goes with them: each module, and its attributes as they were."""

    taken: list[tuple[nn.Module, dict[str, Any]]] = field(default_factory=list)

    def put_on(self) -> None:
        """Gives every module back what it had: the same hook objects, the same wrapped methods."""
        for module, attributes in reversed(self.taken):
            for name, value in attributes.items():
                if name == "forward" and _is_graph_module(module):
                    type(module).forward = value
                elif value is _ABSENT:
                    module.__dict__.pop(name, None)
                else:
                    module.__dict__[name] = value


def is_dispatched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook of accelerate decides where any of these modules runs."""
    return any(_is_dispatch_hook(hook) for module in modules for hook in _hooks_of(module))


def slots(modules: Mapping[str, nn.Module]) -> list[Slot]:
    """Every meta tensor of these modules (by name) whose values a hook keeps elsewhere."""
    found: dict[tuple[int, str], Slot] = {}
    for module_name, module in modules.items():
        for hook in _offload_hooks(module):
            for key, registered, name, tensor in _tensors_of(module, hook.place_submodules):
                if tensor.device.type == "meta" and hook.weights_map is not None:
                    full_name = f"{module_name}.{key}" if module_name else key
                    found.setdefault((id(registered), name), Slot(registered, name, full_name, tensor, hook, key))
    return list(found.values())


def take_off(modules: Iterable[nn.Module]) -> Dispatch:
    """Takes accelerate's dispatch and offload hooks off; other hooks stay. Nothing is loaded, moved or freed.

    A module's `forward` is then its own again, and `to` and `cuda` are no longer guarded.
    """
    dispatch = Dispatch()
    try:
        for module in modules:
            hooks = _hooks_of(module)
            others = [hook for hook in hooks if not _is_dispatch_hook(hook)]
            if len(others) < len(hooks):
                _take_off_one(module, others, dispatch)
            _take_guards(module, dispatch)
    except BaseException:
        dispatch.put_on()
        raise
    return dispatch


def _take_off_one(module: nn.Module, others: list[Any], dispatch: Dispatch) -> None:
    if others:  # accelerate's wrapper around `forward` asks for `_hf_hook` in each call
        _set_aside(module, ["_hf_hook"], dispatch)
        module.__dict__["_hf_hook"] = others[0] if len(others) == 1 else sys.modules["accelerate.hooks"].SequentialHook(*others)
        return
    old_forward = module.__dict__.get("_old_forward", _ABSENT)
    graph = _is_graph_module(module)
    _set_aside(module, ["_hf_hook", "_old_forward", "forward"], dispatch)
    if old_forward is _ABSENT:
        return
    if graph:
        type(module).forward = old_forward
    elif not _is_forward_of_its_class(old_forward, module):
        module.__dict__["forward"] = old_forward  # somebody had replaced it before accelerate came


def _is_forward_of_its_class(forward: Any, module: nn.Module) -> bool:
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and any(
        cls.__dict__.get("forward") is function for cls in type(module).__mro__
    )


def _take_guards(module: nn.Module, dispatch: Dispatch) -> None:
    """`to` and `cuda` as `dispatch_model` wraps them on the root, and the map it leaves there."""
    guards = [
        name
        for name in _GUARDED
        if getattr(module.__dict__.get(name), "__globals__", {}).get("__name__") == "accelerate.big_modeling"
    ]
    if "hf_device_map" in module.__dict__:
        guards.append("hf_device_map")
    if guards:
        _set_aside(module, guards, dispatch)


def _set_aside(module: nn.Module, names: Iterable[str], dispatch: Dispatch) -> None:
    attributes = {name: module.__dict__.get(name, _ABSENT) for name in names}
    if "forward" in attributes and _is_graph_module(module):
        attributes["forward"] = type(module).forward
    dispatch.taken.append((module, attributes))
    for name in attributes:
        module.__dict__.pop(name, None)


_ABSENT: Any = object()
_GUARDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def _hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on this module, those inside a `SequentialHook` one by one."""
    if "accelerate.hooks" not in sys.modules:
        return []
    pending, hooks = [module.__dict__.get("_hf_hook")], []
    while pending:
        hook = pending.pop(0)
        if isinstance(hook, sys.modules["accelerate.hooks"].SequentialHook):
            pending = [*hook.hooks, *pending]
        elif hook is not None:
            hooks.append(hook)
    return hooks


def _is_dispatch_hook(hook: Any) -> bool:
    hooks = sys.modules["accelerate.hooks"]
    return isinstance(hook, (hooks.AlignDevicesHook, hooks.CpuOffload))


def _offload_hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in _hooks_of(module) if getattr(hook, "offload", False) and hasattr(hook, "weights_map")]


def _tensors_of(
    module: nn.Module, recurse: bool
) -> Iterator[tuple[str, dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """(key, registered, name, tensor) of what a hook on `module` looks after; shared modules come under every name."""
    owners = module.named_modules(remove_duplicate=False) if recurse else [("", module)]
    for prefix, owner in owners:
        for registered in (owner._parameters, owner._buffers):
            for name, tensor in registered.items():
                if tensor is not None:
                    yield (f"{prefix}.{name}" if prefix else name), registered, name, tensor  # type: ignore[misc]


def _is_graph_module(module: nn.Module) -> bool:
    return "GraphModuleImpl" in str(type(module))  # accelerate's own test: there it replaces the class's forward
