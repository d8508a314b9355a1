"""Group offload of diffusers: taken off and put back; and the pipelines among what was given.

Group offload keeps the Parameter objects and flips their `data`. On the way out of the GPU it goes
back to pinned copies in `cpu_param_dict`, or stays where `.to()` puts it. With an offload folder it
becomes *uninitialized memory* on the CPU, and the values lie in a safetensors file: to everybody
else that looks like an ordinary tensor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..actions import Action
from ..attributes import Undo, set_aside
from ..errors import MetaTensorsPresent, counted
from ..storages import exchange, stand_in

# Of diffusers.hooks.group_offloading.
_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def groups_of(modules: Iterable[nn.Module]) -> list[Any]:
    """Every `ModuleGroup` that these modules are offloaded in."""
    hooks = (hook for module in modules for hook in _registry_of(module).hooks.values())
    return list({id(hook.group): hook.group for hook in hooks if hasattr(hook, "group")}.values())


def absent(group: Any) -> dict[str, torch.Tensor]:
    """The tensors of a group that are uninitialized memory now, by their keys in its file."""
    if not group.offload_to_disk_path or not group._is_offloaded_to_disk:
        return {}
    onloaded = group.onload_device != group.offload_device
    return {
        key: tensor
        for key, tensor in group.key_to_tensor.items()
        if tensor.device.type == torch.device(group.offload_device).type or not onloaded
    }


def refuse_absent(action: Action, modules: Iterable[nn.Module]) -> None:
    """Raises MetaTensorsPresent if a group has its values on the disk only."""
    files = [group.safetensors_file_path for group in groups_of(modules) if absent(group)]
    if files:
        raise MetaTensorsPresent(
            action,
            f"diffusers' group offload has the values of {counted(len(files), 'group')} on the "
            f"disk only, the first in {files[0]}",
            "Call qmove.materialize_meta_tensors(model) first.",
        )


def take_off(modules: Iterable[nn.Module], undo: Undo) -> None:
    """Takes the hooks of group offload off; `undo` gets what puts them back. No tensor moves."""
    for module in modules:
        registry = _registry_of(module)
        for name in reversed([name for name in registry._hook_order if name in _HOOKS]):
            _take_off_one(module, registry, name, undo)


def _take_off_one(module: nn.Module, registry: Any, name: str, undo: Undo) -> None:
    """As `HookRegistry.remove_hook`, which also calls the hook, and drops it."""
    index = registry._hook_order.index(name)
    reference, outer = (*registry._fn_refs[index : index + 2], None)[:2]
    inner = reference.forward if reference.original_forward is None else reference.original_forward
    if outer is not None:
        set_aside(undo, outer, forward=inner)
    elif (
        getattr(inner, "__self__", None) is module
        and getattr(inner, "__func__", None) is type(module).forward
    ):
        set_aside(undo, module, ["forward"])
    else:
        set_aside(undo, module, forward=inner)
    for numbered in (registry._fn_refs, registry._hook_order):
        undo.note(_put_list_back, numbered, list(numbered))
        del numbered[index]
    undo.note(_put_hooks_back, registry.hooks, dict(registry.hooks))
    del registry.hooks[name]


def _put_list_back(numbered: list[Any], before: list[Any]) -> None:
    numbered[:] = before


def _put_hooks_back(hooks: dict[str, Any], before: dict[str, Any]) -> None:
    hooks.clear()
    hooks.update(before)


def mismatches(groups: Iterable[Any]) -> Iterator[tuple[torch.Tensor, str]]:
    """(tensor, why) for what the pinned copies of a group cannot hold any more."""
    for group in groups:
        for tensor, copy in group.cpu_param_dict.items():
            if tensor.dtype != copy.dtype or tensor.shape != copy.shape:
                now, kept = (f"{t.dtype} of shape {list(t.shape)}" for t in (tensor, copy))
                yield tensor, f"it is {now} now, and the pinned copy that it goes back to is {kept}"


def update_pinned_copies(groups: Iterable[Any]) -> None:
    """Copies current values into the pinned copies, and lets offloaded tensors look into them."""
    for group in groups:
        for tensor, copy in group.cpu_param_dict.items():
            if tensor.device == copy.device and tensor.data_ptr() == copy.data_ptr():
                continue
            with torch.no_grad(), torch.inference_mode(copy.is_inference()):
                copy.copy_(tensor)
            if tensor.device.type == "cpu":
                exchange(tensor, stand_in(tensor, copy))


def write_again(group: Any) -> Callable[[], None]:
    """Writes a group to a new file beside the old one. Returns what makes the group use it.

    The old file stays: diffusers takes a file of that name as it is, also for another model and in
    another process.
    """
    from safetensors.torch import save_file

    stem = group.safetensors_file_path.removesuffix(".safetensors").split(".changed-")[0]
    number = 1
    while os.path.exists(path := f"{stem}.changed-{os.getpid()}-{number}.safetensors"):
        number += 1
    save_file(
        {key: tensor.detach().cpu().contiguous() for key, tensor in group.key_to_tensor.items()},
        path,
    )

    def use() -> None:
        group.safetensors_file_path = path

    return use


def pipelines_in(model: object) -> list[Any]:
    """The diffusers pipelines among what was given: itself, or the values of a dict or list."""
    if isinstance(model, nn.Module):
        return []
    if isinstance(model, Mapping):
        return [pipeline for value in model.values() for pipeline in pipelines_in(value)]
    if isinstance(model, (list, tuple)):
        return [pipeline for value in model for pipeline in pipelines_in(value)]
    return [model] if hasattr(model, "components") and hasattr(model, "__dict__") else []


class _NoHooks:
    hooks: dict[str, Any] = {}  # noqa: RUF012
    _hook_order: tuple[str, ...] = ()


def _registry_of(module: nn.Module) -> Any:
    return module.__dict__.get("_diffusers_hook", _NoHooks)
