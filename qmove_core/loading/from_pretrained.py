"""`qmove.from_pretrained`: a model of transformers, loaded straight into the state asked for."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from .. import devices
from ..errors import MissingDependency, UnknownDevice
from ..model.inventory import inventory
from ..parking import adopting
from ..parking.file_mirrors import mirror_files
from ..parking.requests import park, restore
from ..settings import settings
from .quantizing import QuantizesElsewhere

log = logging.getLogger("qmove")

_CHOSEN_BY_TRANSFORMERS = ("auto", "balanced", "balanced_low_0", "sequential")


def from_pretrained(
    model_class: Any, name: Any, *args: Any, parked: bool = False, **kwargs: Any
) -> Any:
    """`model_class.from_pretrained(name, ...)` of transformers, parked or on its device when it
    returns.

    A model that has one accelerator for a home is loaded in RAM. Weights that the checkpoint has as
    the model has them lie in the file itself, mapped into memory, and take no RAM; others (cast,
    merged, quantized) lie in qmove's page-locked memory. The checkpoint is read once. A weight that
    is quantized while it is loaded (bitsandbytes, torchao, quanto) goes to the accelerator, is
    quantized there as ever, and what it becomes leaves before the next one comes; nothing else is
    on the accelerator before the first use. So the model need not fit there unquantized.

    A model of several devices ("auto" where there are several accelerators, a map to several
    places), or of another method of quantization, is loaded by transformers alone, through VRAM,
    and parked afterwards.

    The files must not be overwritten in place while the model lives (`qmove.mirror_files` says what
    happens then). On Windows they are not mapped, and all weights take RAM.

    Args:
        model_class: an Auto class of transformers, or a model class.
        name: a folder, or what else transformers takes.
        parked: the model waits in RAM and wakes on its device when it is used. Otherwise it is on
            its device when this returns; its files stay its host copy, where the bytes are equal.
        **kwargs: for transformers: `dtype`, `quantization_config`, ...; `device_map` is where the
            model is home: a device, a map, "auto"; None for the current accelerator with `parked`,
            otherwise what transformers makes of it.

    Returns:
        The model; with `output_loading_info=True` that and the information, as ever.

    Raises:
        MissingDependency: transformers is missing or older than 5.
        QMoveError: `model_class` is no class of transformers.
        UnknownDevice: no accelerator to be parked from, or not this one.
        NotEnoughMemory: RAM, or the device, has too little room.
        OSError, ValueError: what transformers raises for a folder, a file or an argument that is
            wrong.
    """
    seams = _seams()
    seams.require(model_class)
    started = time.perf_counter()
    device = _home(kwargs.get("device_map"), parked)
    if device is not None:
        try:
            with seams.loading(device):
                given = model_class.from_pretrained(name, *args, **{**kwargs, **_on_host()})
        except QuantizesElsewhere:
            device = None
        else:
            model = given[0] if isinstance(given, tuple) else given
            adopting.adopt(
                model, device, stays=parked, seconds=lambda: time.perf_counter() - started
            )
            if not parked:
                restore(model)
            return given
    with seams.loading(None) as load:
        given = model_class.from_pretrained(name, *args, **kwargs)
    model = given[0] if isinstance(given, tuple) else given
    on_accelerators = any(place != "cpu" for place in inventory(model).by_device)
    if on_accelerators and load.files and settings.keep_mirrors:
        mirror_files(model, load.files)
    if parked:
        park(model)
    return given


def _on_host() -> dict[str, Any]:
    # Without accelerate transformers takes no device_map, and loads on the host anyway.
    return {"device_map": {"": "cpu"} if importlib.util.find_spec("accelerate") else None}


def _home(device_map: Any, parked: bool) -> torch.device | None:
    """The one accelerator that the model is home on; None where transformers is to place it."""
    if isinstance(device_map, Mapping):
        places = set(map(str, device_map.values()))
        if len(places) != 1 or places & {"disk", "meta"}:
            return None
        (device_map,) = set(device_map.values())
    if device_map is None and not parked:
        return None
    if device_map in (None, *_CHOSEN_BY_TRANSFORMERS):
        accelerator = devices.accelerator()
        if accelerator is None:
            if not parked:
                return None
            raise UnknownDevice(
                "A model is parked out of the VRAM of an accelerator, and this machine has none. "
                "Leave parked=True out."
            )
        is_choice = device_map is not None and torch.accelerator.device_count() > 1
        return None if is_choice or not parked else devices.resolve(accelerator)
    if device_map in ("disk", "meta"):
        return None
    device = devices.resolve(device_map)
    if device.type != "cpu":
        return device
    if parked:
        raise UnknownDevice(
            "A model whose home is the CPU is not parked. Name the accelerator on which it is to "
            "wake, or leave parked=True out."
        )
    return None


def _seams() -> Any:
    try:
        from . import transformers_seams
    except ImportError as error:
        raise MissingDependency(
            f"Loading a model needs transformers 5 ({error}): pip install 'transformers>=5'"
        ) from error
    return transformers_seams
