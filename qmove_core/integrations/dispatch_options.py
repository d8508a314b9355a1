"""How a model was dispatched: what accelerate needs to be told to do it again, without another offload folder.

It is plain data: a materialized model must not keep the weights alive that its hooks kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .accelerate_dispatch import hooks_of, is_offload_hook


@dataclass(frozen=True)
class DispatchOptions:
    """The arguments of `accelerate.dispatch_model`, as far as the hooks still tell them.

    Attributes:
        device_map: from names of modules to devices, "cpu" and "disk".
        main_device: where what lies on "cpu" and "disk" is run.
        offload_dir: the folder of the `.dat` files, if there is one.
        offload_index: what each weight on the disk is called there.
        offload_buffers, skip_keys, preload_module_classes: as in accelerate.
    """

    device_map: dict[str, Any]
    main_device: Any
    offload_dir: str | None
    offload_index: dict[str, Any] | None
    offload_buffers: bool
    skip_keys: Any
    preload_module_classes: list[str] | None


def remember(modules: Iterable[nn.Module]) -> None:
    """Notes how each of these modules that carries a device map was dispatched."""
    for module in modules:
        if isinstance(module.__dict__.get("hf_device_map"), Mapping):
            _remembered[module] = _options_of(module)


def remembered(model: object) -> DispatchOptions | None:
    """How `model` was dispatched before it was materialized."""
    return _remembered.get(model) if isinstance(model, nn.Module) else None


_remembered: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _options_of(root: nn.Module) -> DispatchOptions:
    hooks = [(module, hook) for module in root.modules() for hook in hooks_of(module)]
    offloading = [(module, hook) for module, hook in hooks if is_offload_hook(hook)]
    loaders = [
        loader for _module, hook in offloading if (loader := _loader(hook.weights_map)) is not None
    ]
    loader = next((loader for loader in loaders if loader.index), None)
    return DispatchOptions(
        device_map=dict(root.hf_device_map),  # type: ignore[arg-type]
        main_device=next(
            (
                hook.execution_device
                for module, hook in hooks
                if module is root and hasattr(hook, "execution_device")
            ),
            None,
        ),
        offload_dir=None
        if loader is None or loader.save_folder is None
        else str(loader.save_folder),
        offload_index=None if loader is None else dict(loader.index),
        offload_buffers=any(hook.offload_buffers for _module, hook in offloading),
        skip_keys=next(
            (hook.skip_keys for _module, hook in hooks if getattr(hook, "skip_keys", None)), None
        ),
        preload_module_classes=sorted(
            {type(module).__name__ for module, hook in offloading if hook.place_submodules}
        )
        or None,
    )


def _loader(weights_map: Mapping[str, Any] | None) -> Any:
    while hasattr(weights_map, "dataset"):
        weights_map = weights_map.dataset  # type: ignore[union-attr]
    return (
        weights_map
        if hasattr(weights_map, "index") and hasattr(weights_map, "save_folder")
        else None
    )
