"""accelerate's dispatch hooks: which weights they keep elsewhere, and how they come off and back as the very same objects.

accelerate's own `remove_hook_from_module` calls `detach_hook`, which loads back only what was real before the dispatch. In a
model that transformers loaded nothing was: the meta tensors remain, and the hooks that knew where the values lie are gone.
So here hooks are only set aside: their attributes leave the modules, and come back as they were.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..actions import Action
from ..attributes import set_aside
from ..class_variants import own_class
from ..errors import MetaTensorsPresent, counted
from ..model.holdings import Inventory
from ..model.kinds import bitsandbytes_offloaded
from .weights_map import has_entry


@dataclass(frozen=True)
class Slot:
    """A name in a module whose values a hook keeps elsewhere: what stands there is fetched anew in each forward.

    Attributes:
        module: the module that has the tensor.
        registered, name: its dictionary of parameters or of buffers, and the name in it.
        full_name: the name in the whole model.
        tensor: what stands there now: a meta tensor; or, until the first forward, a real one that it is tied to.
        hook: the hook that keeps the values.
        key: under which its `weights_map` has them.
    """

    module: nn.Module
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


def is_dispatched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook of accelerate decides where any of these modules runs."""
    return any(is_dispatch_hook(hook) for module in modules for hook in hooks_of(module))


def slots(modules: Mapping[str, nn.Module]) -> list[Slot]:
    """Every parameter and buffer of these modules (by name) whose values a hook keeps elsewhere."""
    found: dict[tuple[int, str], Slot] = {}
    for module_name, module in modules.items():
        for hook in _offload_hooks(module):
            for key, owner, registered, name, tensor in _tensors_of(module, hook):
                if hook.weights_map is not None:
                    full_name = f"{module_name}.{key}" if module_name else key
                    found.setdefault(
                        (id(registered), name),
                        Slot(owner, registered, name, full_name, tensor, hook, key),
                    )
    return list(found.values())


def refuse_lost(action: Action, held: Inventory) -> None:
    """Raises MetaTensorsPresent if the model has meta tensors whose data no hook keeps."""
    kept = (
        {id(tensor) for slot in slots(held.modules) for tensor in _with_parts(slot)}
        if held.meta
        else set()
    )
    lost = [meta for meta in held.meta if id(meta.tensor) not in kept]
    if lost:
        raise MetaTensorsPresent(
            action,
            f"no dispatch knows where the data of {counted(len(lost), 'meta tensor')} is, "
            f"the first is {lost[0].name!r}",
            "qmove.materialize_meta_tensors reads what a dispatch keeps elsewhere, so it cannot help here: "
            "hooks were removed after the dispatch, or the weights were never loaded "
            "(init_empty_weights). Load the checkpoint again.",
        )


def part_keys(slot: Slot) -> dict[str, str]:
    """The keys of what hangs on a quantized weight and is fetched with it, by the name of the part."""
    weights_map = slot.hook.weights_map
    return bitsandbytes_offloaded.part_keys(
        slot.tensor, slot.key, lambda key: has_entry(weights_map, key)
    )


def _with_parts(slot: Slot) -> list[torch.Tensor]:
    keys = part_keys(slot)
    if not keys or not all(has_entry(slot.hook.weights_map, key) for key in keys.values()):
        return [slot.tensor]
    return [slot.tensor, *bitsandbytes_offloaded.tensors_on(slot.tensor)]


def take_off(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Takes accelerate's dispatch and offload hooks off; other hooks stay. Nothing is loaded, moved or freed.

    A module's `forward` is then its own again, and `to` and `cuda` are no longer guarded. `undo` gets what gives every
    module back the same hook objects and the same wrapped methods.
    """
    for module in modules:
        hooks = hooks_of(module)
        others = [hook for hook in hooks if not is_dispatch_hook(hook)]
        if others and len(others) < len(hooks):
            # accelerate's wrapper around `forward` asks for `_hf_hook` in each call
            kept = sys.modules["accelerate.hooks"].SequentialHook(*others)
            undo.callback(set_aside(module, _hf_hook=others[0] if len(others) == 1 else kept))
        elif hooks and not others:
            _take_forward(module, undo)
        _take_guards(module, undo)


def _take_forward(module: nn.Module, undo: ExitStack) -> None:
    """Gives a module the forward that it had before accelerate wrapped it."""
    wrapped = "_old_forward" in module.__dict__
    old_forward = module.__dict__.get("_old_forward")
    instead = {}
    if wrapped and _is_graph_module(module):
        cls: Any = own_class(module)
        undo.callback(setattr, cls, "forward", cls.forward)
        cls.forward = old_forward
    elif wrapped and not is_forward_of_its_class(old_forward, module):
        instead["forward"] = old_forward  # somebody had replaced it before accelerate came
    undo.callback(set_aside(module, ["_hf_hook", "_old_forward", "forward"], **instead))


def take_off_pipelines(pipelines: Iterable[Any], undo: ExitStack) -> None:
    """What diffusers' pipelines note about offloading: with `_all_hooks` the next call would enable it again."""
    for pipeline in pipelines:
        undo.callback(set_aside(pipeline, ["_all_hooks", "hf_device_map"]))


def is_forward_of_its_class(forward: Any, module: nn.Module) -> bool:
    """Whether it is the bound method that `module.forward` is when nobody has replaced it."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and any(
        cls.__dict__.get("forward") is function for cls in type(module).__mro__
    )


def _take_guards(module: nn.Module, undo: ExitStack) -> None:
    """`to` and `cuda` as `dispatch_model` wraps them on the root, and the map it leaves there."""
    names = [name for name in _GUARDED if _is_guard(module.__dict__.get(name))]
    names += ["hf_device_map"] if "hf_device_map" in module.__dict__ else []
    kept_by_enable_to = module.__dict__.get(METHODS_BEFORE, {})
    others = {name: method for name, method in kept_by_enable_to.items() if not _is_guard(method)}
    instead = {METHODS_BEFORE: others} if len(others) < len(kept_by_enable_to) else {}
    if names or instead:
        undo.callback(set_aside(module, names, **instead))


def _is_guard(method: Any) -> bool:
    return getattr(method, "__globals__", {}).get("__name__") == "accelerate.big_modeling"


METHODS_BEFORE = (
    "_qmove_methods_before"  # where `enable_to` keeps the methods of a model's `__dict__`
)
_GUARDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")


def hooks_of(module: nn.Module) -> list[Any]:
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


def is_dispatch_hook(hook: Any) -> bool:
    hooks = sys.modules["accelerate.hooks"]
    # The last is the hook of diffusers' ComponentsManager.
    return (
        isinstance(hook, (hooks.AlignDevicesHook, hooks.CpuOffload))
        or type(hook).__name__ == "CustomOffloadHook"
    )


def _offload_hooks(module: nn.Module) -> list[Any]:
    return [hook for hook in hooks_of(module) if is_offload_hook(hook)]


def is_offload_hook(hook: Any) -> bool:
    """Whether a hook keeps weights elsewhere and fetches them in each forward."""
    return bool(getattr(hook, "offload", False)) and hasattr(hook, "weights_map")


def _tensors_of(
    module: nn.Module, hook: Any
) -> Iterator[tuple[str, nn.Module, dict[str, torch.Tensor | None], str, torch.Tensor]]:
    """(key, owner, registered, name, tensor) of what a hook on `module` looks after; shared modules come under every name."""
    owners = (
        module.named_modules(remove_duplicate=False) if hook.place_submodules else [("", module)]
    )
    for prefix, owner in owners:
        for registered in (owner._parameters, owner._buffers):
            for name, tensor in registered.items():
                kept = registered is owner._parameters or (
                    hook.offload_buffers and name not in owner._non_persistent_buffers_set
                )
                if tensor is not None and (kept or tensor.device.type == "meta"):
                    key = f"{prefix}.{name}" if prefix else name
                    yield key, owner, registered, name, tensor  # type: ignore[misc]


def _is_graph_module(module: nn.Module) -> bool:
    return "GraphModuleImpl" in str(
        type(module)
    )  # accelerate's own test: there it replaces the class's forward
