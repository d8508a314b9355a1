"""accelerate's `dispatch_model` with a way back, and the way forth again: the old map, and the files that are there already."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import homes
from ..errors import MissingDependency, QMoveError
from ..integrations.accelerate_dispatch import is_dispatched
from ..integrations.dispatch_options import DispatchOptions, remembered
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
        device_map: from names of modules to devices, "cpu" or "disk"; or "auto", "balanced", ... to let accelerate choose one.
        allow_materialize: give the model `materialize(device="cpu")`, `materialized()` and `materialize_all(device="cpu")`, and
            let `to()` materialize first; see `enable_to`.
        **options: for accelerate: `offload_dir`, `offload_index`, `state_dict`, `offload_buffers`, `main_device`, ...; and
            `max_memory` and `no_split_module_classes` with a named device_map.

    Returns:
        The model.
    """
    big_modeling, modeling = _accelerate()
    if isinstance(device_map, str):
        device_map = _named_map(modeling, model, device_map, options)
    big_modeling.dispatch_model(model, device_map, **options)
    return enable_to(model) if allow_materialize else model


def redispatch(
    model: nn.Module, device_map: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Dispatches a materialized model again. What lies in its old offload files is not written again.

    Weights that have changed since then are kept in RAM, and the files stay as they are. accelerate makes new Parameter objects
    where it moves weights; for the very same objects use `with materialized(model)`.

    Args:
        model: what `materialize_meta_tensors` returned. A dispatched model is materialized first.
        device_map: None for the old one.
        **options: for accelerate, in place of those of the old dispatch. Modules that are on "disk" now and were not before need
            an `offload_dir`.

    Raises:
        QMoveError: there was no dispatch with a device_map, or the old files do not have all that is to be on the disk.
    """
    big_modeling, _modeling = _accelerate()
    with homes.lock:
        if is_dispatched(model.modules()):
            materialize_meta_tensors(model)
        old = remembered(model)
        if device_map is None and old is None:
            raise QMoveError(
                f"{type(model).__name__} was not dispatched with a device_map before: redispatch(model, device_map=...)."
            )
        chosen = dict(device_map if device_map is not None else old.device_map)  # type: ignore[union-attr]
        if requests.is_parked(model):
            requests.move(model, "cpu")
        arguments = _arguments(model, chosen, old, options)
        big_modeling.dispatch_model(model, chosen, **arguments)
    return model


def _arguments(
    model: nn.Module,
    device_map: dict[str, Any],
    old: DispatchOptions | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    if old is None:
        return options
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
            arguments["state_dict"] = {
                name: tensor.detach() for name, tensor in in_ram.items()
            } | changed
    return arguments | options


def _changed(on_disk: Mapping[str, torch.Tensor], old: DispatchOptions) -> dict[str, torch.Tensor]:
    """Host copies of the tensors that are not in the old offload files as they are now."""
    entries: Any = _Entries(old)
    sources, changed, missing = Sources(), {}, []
    for name, tensor in on_disk.items():
        try:
            source = sources.find(entries, name)
        except (KeyError, Unusable) as error:
            missing.append(f"{name} ({error})")
            continue
        value = tensor.detach().cpu()
        if source.mismatch(tensor) or not _same_bytes(
            source.cast(source.open()).to(tensor.dtype), value
        ):
            changed[name] = value
    if missing:
        raise QMoveError(
            f"{len(missing)} tensors that are to be on the disk are not in the old offload files, the first is {missing[0]}. "
            "Nothing was changed. Pass offload_dir=... to write them to another folder."
        )
    return changed


class _Entries:
    """What `Sources` looks for in accelerate's OffloadedWeightsLoader."""

    def __init__(self, old: DispatchOptions) -> None:
        self.state_dict: dict[str, torch.Tensor] = {}
        self.index = old.offload_index or {}
        self.save_folder = old.offload_dir


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


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
    limits = options.pop("max_memory", None)
    classes = (
        options.pop("no_split_module_classes", None)
        or getattr(model, "_no_split_modules", None)
        or None
    )
    if name not in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise QMoveError(
            f"There is no device_map {name!r}. It is 'auto', 'balanced', 'balanced_low_0', "
            "'sequential', or a map from names to devices."
        )
    if name != "sequential":
        limits = modeling.get_balanced_memory(
            model,
            max_memory=limits,
            no_split_module_classes=classes,
            low_zero=name == "balanced_low_0",
        )
    chosen: dict[str, Any] = modeling.infer_auto_device_map(
        model, max_memory=limits, no_split_module_classes=classes
    )
    return chosen


def _accelerate() -> tuple[Any, Any]:
    try:
        from accelerate import big_modeling
        from accelerate.utils import modeling
    except ImportError as error:
        raise MissingDependency(
            "Dispatching a model needs accelerate: pip install accelerate"
        ) from error
    return big_modeling, modeling
