"""accelerate's dispatch hooks: which weights they keep elsewhere, and how they come off and back.

accelerate's own `remove_hook_from_module` calls `detach_hook`, which loads back only what was real
before the dispatch. In a model that transformers loaded nothing was: the meta tensors remain, and
the hooks that knew where the values lie are gone. So here hooks are only set aside: their
attributes leave the modules, and come back as they were.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..actions import Action
from ..attributes import Undo, set_aside
from ..class_variants import own_class
from ..errors import CannotMove, MetaTensorsPresent, counted
from ..model.holdings import Inventory
from ..model.kinds import bitsandbytes_offloaded, wrappers
from .tensor_slots import Slot, registered_slots
from .weights_map import has_entry, loader_of


def is_dispatched(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook of accelerate decides where any of these modules runs."""
    return any(is_dispatch_hook(hook) for module in modules for hook in hooks_of(module))


def slots(modules: Mapping[str, nn.Module]) -> list[Slot]:
    """Every parameter and buffer of these modules (by name) whose values a hook keeps elsewhere.

    Their tensors are on the meta device; or real until the first forward, where they are tied to a
    real one.
    """
    found: dict[tuple[int, str], Slot] = {}
    for module_name, module in modules.items():
        for hook in hooks_of(module):
            if _is_offload_hook(hook) and hook.weights_map is not None:
                for slot in _slots_of_hook(module, hook):
                    slot.hook, slot.key = hook, slot.full_name
                    slot.full_name = f"{module_name}.{slot.key}" if module_name else slot.key
                    found.setdefault((id(slot.registered), slot.name), slot)
    return list(found.values())


def _slots_of_hook(module: nn.Module, hook: Any) -> Iterator[Slot]:
    """The slots of a hook on `module`; shared modules come under every name."""
    owners = {"": module}
    if hook.place_submodules:
        owners = dict(module.named_modules(remove_duplicate=False))
    for slot in registered_slots(owners):
        if isinstance(slot.module, torch.jit.ScriptModule):
            continue  # it keeps its tensors in C++, where no other can take their place
        kept = not slot.is_buffer or (
            hook.offload_buffers and slot.name not in slot.module._non_persistent_buffers_set
        )
        if kept or slot.tensor.device.type == "meta":
            yield slot


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
            "qmove.materialize_meta_tensors reads what a dispatch keeps elsewhere, so it cannot "
            "help here: hooks were removed after the dispatch, or the weights were never loaded "
            "(init_empty_weights), or TorchScript has the module and takes no other tensors. Load "
            "the checkpoint again.",
        )


def refuse_compiled(action: Action, held: Inventory) -> None:
    """Raises CannotMove where accelerate's hook is on what `torch.compile` returned: half of it
    hangs on the model inside, and cannot be told from that one's own."""
    for name, module in held.modules.items():
        forward = module.__dict__.get("forward")
        wrapper = getattr(getattr(forward, "func", None), "__module__", "")
        if "_orig_mod" in module._modules and wrapper == "accelerate.hooks":
            reason = "it was dispatched after torch.compile; compile it after the dispatch"
            raise CannotMove(action, [(name or type(module).__name__, reason)])


def part_keys(slot: Slot) -> dict[str, str]:
    """The keys of what belongs to a quantized weight and is fetched with it, by part."""
    weights_map = slot.hook.weights_map
    return bitsandbytes_offloaded.part_keys(
        slot.tensor, slot.key, lambda key: has_entry(weights_map, key)
    )


def _with_parts(slot: Slot) -> list[torch.Tensor]:
    if wrappers.is_wrapper(slot.tensor):
        return wrappers.innermost(slot.tensor)
    keys = part_keys(slot)
    if not keys or not all(has_entry(slot.hook.weights_map, key) for key in keys.values()):
        return [slot.tensor]
    return [slot.tensor, *bitsandbytes_offloaded.tensors_on(slot.tensor)]


def take_off(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Takes accelerate's dispatch and offload hooks off. Moves no tensor; other hooks stay.

    A module's `forward` is then its own again, and `to` and `cuda` are no longer guarded. `undo`
    gets what gives every module back the same hook objects and the same wrapped methods.
    """
    for module in modules:
        hooks = hooks_of(module)
        others = [hook for hook in hooks if not is_dispatch_hook(hook)]
        if others and len(others) < len(hooks):
            # accelerate's wrapper around `forward` reads `_hf_hook` in each call
            kept = sys.modules["accelerate.hooks"].SequentialHook(*others)
            set_aside(undo, module, _hf_hook=others[0] if len(others) == 1 else kept)
        elif hooks and not others:
            _take_forward(module, undo)
        _take_guards(module, undo)


def _take_forward(module: nn.Module, undo: Undo) -> None:
    """Gives a module the forward that it had before accelerate wrapped it."""
    wrapped = "_old_forward" in module.__dict__
    old_forward = module.__dict__.get("_old_forward")
    instead = {}
    if wrapped and _is_graph_module(module):
        cls: Any = own_class(module)
        undo.note(setattr, cls, "forward", cls.forward)
        cls.forward = old_forward
    elif wrapped and not is_forward_of_its_class(old_forward, module):
        instead["forward"] = old_forward  # it was replaced before the dispatch
    set_aside(undo, module, ["_hf_hook", "_old_forward", "forward"], **instead)


def take_off_pipelines(pipelines: Iterable[Any], undo: Undo) -> None:
    """What pipelines of diffusers note about offloading, which would enable it again."""
    for pipeline in pipelines:
        set_aside(undo, pipeline, ["_all_hooks", "hf_device_map"])


def is_forward_of_its_class(forward: Any, module: nn.Module) -> bool:
    """Whether it is the bound method that `module.forward` is unless it is replaced."""
    function = getattr(forward, "__func__", None)
    return getattr(forward, "__self__", None) is module and any(
        cls.__dict__.get("forward") is function for cls in type(module).__mro__
    )


def _take_guards(module: nn.Module, undo: Undo) -> None:
    """`to` and `cuda` as `dispatch_model` wraps them on the root, and the map it leaves there."""
    names = [name for name in _GUARDED if _is_guard(module.__dict__.get(name))]
    names += ["hf_device_map"] if "hf_device_map" in module.__dict__ else []
    kept_by_enable_to = module.__dict__.get(METHODS_BEFORE, {})
    others = {name: method for name, method in kept_by_enable_to.items() if not _is_guard(method)}
    instead = {METHODS_BEFORE: others} if len(others) < len(kept_by_enable_to) else {}
    if names or instead:
        set_aside(undo, module, names, **instead)


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


def _is_offload_hook(hook: Any) -> bool:
    """Whether a hook keeps weights elsewhere and fetches them in each forward."""
    return bool(getattr(hook, "offload", False)) and hasattr(hook, "weights_map")


def _is_graph_module(module: nn.Module) -> bool:
    # accelerate's own test: of these it replaces the forward of the class
    return "GraphModuleImpl" in str(type(module))


@dataclass(frozen=True)
class DispatchOptions:
    """The arguments of `accelerate.dispatch_model`, as far as the hooks still show them.

    It is plain data: a materialized model must not keep the weights alive that its hooks kept.

    Attributes:
        device_map: from names of modules to devices, "cpu" and "disk".
        main_device: where what lies on "cpu" and "disk" is run.
        offload_dir: the folder of the `.dat` files, if there is one.
        offload_index: what each weight on the disk is called there.
        offload_buffers, skip_keys, preload_module_classes: as in accelerate.
    """

    device_map: dict[str, Any]
    main_device: Any
    offload_dir: Any
    offload_index: dict[str, Any] | None
    offload_buffers: bool
    skip_keys: Any
    preload_module_classes: list[str] | None


_remembered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember_options(modules: Iterable[nn.Module]) -> None:
    """Notes how each of these modules that carries a device map was dispatched."""
    for module in modules:
        if isinstance(module.__dict__.get("hf_device_map"), Mapping):
            _remembered[module] = _options_of(module)


def remembered_options(model: object) -> DispatchOptions | None:
    """How `model` was dispatched before it was materialized."""
    return _remembered.get(model) if isinstance(model, nn.Module) else None


def _options_of(root: Any) -> DispatchOptions:
    hooks = [(module, hook) for module in root.modules() for hook in hooks_of(module)]
    offloading = [(module, hook) for module, hook in hooks if _is_offload_hook(hook)]
    loaders = [loader_of(hook.weights_map) for _module, hook in offloading]
    loader = next((loader for loader in loaders if loader is not None and loader.index), None)
    devices = [getattr(hook, "execution_device", None) for hook in hooks_of(root)]
    skip_keys = [getattr(hook, "skip_keys", None) for _module, hook in hooks]
    preloading = {type(module).__name__ for module, hook in offloading if hook.place_submodules}
    return DispatchOptions(
        device_map=copy.copy(root.hf_device_map),
        main_device=next((device for device in devices if device is not None), None),
        offload_dir=None if loader is None else loader.save_folder,
        offload_index=None if loader is None else dict(loader.index),
        offload_buffers=any(hook.offload_buffers for _module, hook in offloading),
        skip_keys=next((keys for keys in skip_keys if keys), None),
        preload_module_classes=sorted(preloading) or None,
    )
