"""accelerate's `dispatch_model` for models that materialize, and the same dispatch again later."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import homes
from ..errors import MissingDependency, QMoveError, counted
from ..integrations.accelerate_dispatch import DispatchOptions, is_dispatched, remembered_options
from ..integrations.weights_map import Sources, Unusable
from ..materialize.materialize import materialize_meta_tensors
from ..parking import requests
from .to_method import enable_to


def dispatch_model(
    model: nn.Module,
    device_map: Mapping[str, Any] | str,
    allow_materialize: bool = True,
    **options: Any,
) -> Any:
    """accelerate's `dispatch_model`, after which the model can be materialized.

    Args:
        model: a module with its weights in memory.
        device_map: from names of modules to devices, "cpu" or "disk"; or "auto", "balanced", ... to
            let accelerate choose one.
        allow_materialize: give the model `materialize(device="cpu")`, `materialized()` and
            `materialize_all(device="cpu")`, and let `to()` materialize first; see `enable_to`.
        **options: for accelerate: `offload_dir`, `offload_index`, `state_dict`, `offload_buffers`,
            `main_device`, ...; and `max_memory` and `no_split_module_classes` with a named
            device_map.

    Returns:
        The model.

    Raises:
        MissingDependency: accelerate is missing.
        ValueError: what accelerate raises for a map that does not name all of the model.
    """
    accelerate = _accelerate()
    if isinstance(device_map, str):
        device_map = _named_map(accelerate.utils.modeling, model, device_map, options)
    accelerate.dispatch_model(model, device_map, **options)
    return enable_to(model) if allow_materialize else model


def redispatch(
    model: nn.Module, device_map: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Dispatches a materialized model again. What its old offload files hold is not written again.

    Weights that have changed since then are kept in RAM, and the files stay as they are. accelerate
    makes new Parameter objects where it moves weights; for the very same objects use `with
    materialized(model)`.

    Args:
        model: what `materialize_meta_tensors` returned. A dispatched model is materialized first.
        device_map: None for the old one.
        **options: for accelerate, in place of those of the old dispatch. Modules that are on "disk"
            now and were not before need an `offload_dir`.

    Raises:
        QMoveError: there was no dispatch with a device_map, or the old files do not have all that
            is to be on the disk.
    """
    accelerate = _accelerate()
    with homes.lock:
        if is_dispatched(model.modules()):
            materialize_meta_tensors(model)
        old = remembered_options(model)
        if device_map is None and old is None:
            raise QMoveError(
                f"{type(model).__name__} was not dispatched with a device_map before. "
                "Call redispatch(model, device_map=...)."
            )
        chosen = dict(old.device_map if old and device_map is None else device_map or {})
        if requests.is_parked(model):
            requests.move(model, "cpu")
        if old is not None:
            options = _arguments(model, chosen, old, options)
        accelerate.dispatch_model(model, chosen, **options)
    return model


def _arguments(
    model: nn.Module, device_map: dict[str, Any], old: DispatchOptions, options: dict[str, Any]
) -> dict[str, Any]:
    """What accelerate is called with: the old arguments, and `options` in place of some of them."""
    arguments = {
        "main_device": old.main_device,
        "offload_buffers": old.offload_buffers,
        "skip_keys": old.skip_keys,
        "preload_module_classes": old.preload_module_classes,
    }
    on_disk = _tensors_on(model, device_map, "disk", with_buffers=old.offload_buffers)
    if on_disk and "offload_dir" not in options and "offload_index" not in options:
        changed = _changed(on_disk, old)
        arguments |= {"offload_dir": old.offload_dir, "offload_index": old.offload_index}
        if changed:
            in_ram = _tensors_on(model, device_map, "cpu", with_buffers=True)
            kept = {name: tensor.detach() for name, tensor in in_ram.items()}
            arguments["state_dict"] = kept | changed
    return arguments | options


def _changed(on_disk: Mapping[str, torch.Tensor], old: DispatchOptions) -> dict[str, torch.Tensor]:
    """Host copies of the tensors that are not in the old offload files as they are now."""
    entries: Any = SimpleNamespace(  # as accelerate's OffloadedWeightsLoader
        state_dict={}, index=old.offload_index or {}, save_folder=old.offload_dir
    )
    sources, changed, missing = Sources(), {}, []
    for name, tensor in on_disk.items():
        try:
            source = sources.find(entries, name)
        except (KeyError, Unusable) as error:
            missing.append(f"{name} ({error})")
            continue
        value = tensor.detach().cpu()
        same = not source.mismatch(tensor) and torch.equal(
            _bytes_of(source.cast(source.open()).to(tensor.dtype)), _bytes_of(value)
        )
        if not same:
            changed[name] = value
    if missing:
        raise QMoveError(
            f"The old offload files lack {counted(len(missing), 'tensor')} of those for the disk, "
            f"the first is {missing[0]}. Nothing was changed. Pass offload_dir=... to write to "
            "another folder."
        )
    return changed


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _tensors_on(
    model: nn.Module, device_map: Mapping[str, Any], place: str, with_buffers: bool
) -> dict[str, torch.Tensor]:
    """The tensors of the state dict whose module the map puts on `place`."""
    prefixes = [name for name, device in device_map.items() if device == place]
    buffers = {name for name, _buffer in model.named_buffers(remove_duplicate=False)}
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if any(not prefix or f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
        and (with_buffers or name not in buffers)
    }


def _named_map(
    modeling: Any, model: nn.Module, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    if name not in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise QMoveError(
            f"There is no device_map {name!r}. It is 'auto', 'balanced', 'balanced_low_0', "
            "'sequential', or a map from names to devices."
        )
    limits = options.pop("max_memory", None)
    classes = options.pop("no_split_module_classes", None)
    classes = classes or getattr(model, "_no_split_modules", None) or None
    if name != "sequential":
        low_zero = name == "balanced_low_0"
        limits = modeling.get_balanced_memory(model, limits, classes, low_zero=low_zero)
    chosen: dict[str, Any] = modeling.infer_auto_device_map(model, limits, classes)
    return chosen


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise MissingDependency(
            "Dispatching a model needs accelerate: pip install accelerate"
        ) from error
    return accelerate
