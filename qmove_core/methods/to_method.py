"""`model.to()` that works: the model's own methods do what `qmove.move` does.

The model gets a variant of its class with other methods. In the model's `__dict__` they would have
to refer to the model. A strong reference keeps a deleted model in VRAM until the garbage collector
runs; with a weak one a model that is moved in the line that loads it is lost.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from .. import homes
from ..class_variants import Variants, base_of, own_class, reduce_as_own_class
from ..errors import DtypeCastRefused, QMoveError
from ..integrations.accelerate_dispatch import METHODS_BEFORE
from ..interrupts import all_or_nothing
from ..materialize.materialize import Materialized, materialize, materialize_meta_tensors
from ..materialize.undo import materialized
from ..model.inventory import inventory
from ..model.quantized import is_quantized, quantized_weights
from ..parking import sleeping
from ..parking.requests import is_parked, move, restore
from . import own_methods

Model = TypeVar("Model")
Original = Callable[..., Any]  # the method without qmove


def enable_to(model: Model) -> Model:
    """Makes the methods `to`, `cpu` and `cuda` do what `qmove.move` does, past libraries' guards.

    What the model's own class notes of its device in an override of these methods is noted as ever.
    Casts (`.half()`, `.to(dtype)`, ...) work as before, but raise DtypeCastRefused while the model
    holds quantized weights; a parked model comes home for one. No flag of the model is edited. A
    copy of an enabled model is an ordinary one. Enabling twice does nothing.

    Args:
        model: an `nn.Module` or a pipeline. The methods of its submodules stay as they are.

    Returns:
        The model.

    Raises:
        QMoveError: the class of this object allows no subclass.
    """
    if is_enabled(model):
        return model
    try:
        sleeping.exchange_class(model, _enabled.of)
    except TypeError as error:
        raise QMoveError(
            f"Cannot give {type(model).__qualname__} other methods ({error}). "
            "Call qmove.move(model, device)."
        ) from error
    before = {name: model.__dict__[name] for name in _METHODS if name in model.__dict__}
    if before:
        model.__dict__[METHODS_BEFORE] = before
    return model


def disable_to(model: Model) -> Model:
    """Gives the model the very methods back that it had before `enable_to`. It is not moved.

    Args:
        model: one that was enabled; nothing happens to another.

    Returns:
        The model.
    """
    if is_enabled(model):
        sleeping.exchange_class(model, base_of)
        model.__dict__.pop(METHODS_BEFORE, None)
    return model


def is_enabled(model: object) -> bool:
    """Whether `enable_to` was called on exactly this object."""
    return any(_enabled.made(cls) for cls in type(model).__mro__)


def _to(model: Any, original: Original, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("silence_dtype_warnings", None)  # of diffusers' pipelines
    device, dtype, _non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None:
        _refuse_cast(model, f"to({dtype})")
    if dtype is None and memory_format is None:
        if device is not None:
            _moved(model, device)
            own_methods.let_note(model, "to", args, kwargs)
        return model
    # A cast does not wake a parked model, and the weights that it makes would have no home.
    if is_parked(model):
        restore(model, device)
    if dtype is not None and device is not None and own_methods.has_own(model, "to"):
        _moved(model, device)
        original(*args, **kwargs)
        return model
    if dtype is not None:
        original(dtype)
    if memory_format is not None:
        _set_memory_format(model, memory_format)
    return model if device is None else _moved(model, device)


def _accelerator(device_type: str) -> Callable[..., Any]:
    def to_accelerator(model: Any, original: Original, device: Any = None) -> Any:
        told = () if device is None else (device,)
        if isinstance(device, int):
            device = f"{device_type}:{device}"
        _moved(model, device_type if device is None else device)
        own_methods.let_note(model, device_type, told)
        return model

    return to_accelerator


def _to_host(model: Any, original: Original) -> Any:
    _moved(model, "cpu")
    own_methods.let_note(model, "cpu")
    return model


def _cast(name: str) -> Callable[..., Any]:
    def cast(model: Any, original: Original, *args: Any) -> Any:
        _refuse_cast(model, f"{name}({', '.join(map(str, args))})")
        if is_parked(model):
            restore(model)
        original(*args)
        return model

    return cast


def _calls(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(model: Any, original: Original, device: Any = "cpu", *, progress: Any = None) -> Any:
        return function(model, device, progress=progress)

    return call


def _materialize_all(model: Any, device: Any, *, progress: Any) -> Any:
    """Gives every meta tensor its data and moves the whole model to `device`, to run there."""
    return _moved(materialize_meta_tensors(model, progress=progress), device)


# name -> (what the method does, whether a class without such a method gets it too)
_METHODS: dict[str, tuple[Callable[..., Any], bool]] = {
    "to": (_to, True),
    "cpu": (_to_host, True),
    "cuda": (_accelerator("cuda"), True),
    "xpu": (_accelerator("xpu"), False),
    **{name: (_cast(name), False) for name in ("half", "float", "double", "bfloat16", "type")},
    "materialize": (_calls(materialize_meta_tensors), True),
    "materialize_all": (_calls(_materialize_all), True),
    "materialized": (_calls(materialized), True),
}


def _moved(model: Any, device: Any) -> Any:
    found: list[Materialized] = []
    materialize(model, "cpu", note=found.append)  # what accelerate dispatched
    try:
        move(model, device)
    except BaseException:
        for done in found:
            all_or_nothing(done.undo.undo)
        raise
    return model


def _refuse_cast(model: Any, call: str) -> None:
    names = quantized_weights(inventory(model))
    if names:
        raise DtypeCastRefused(
            f"{type(model).__name__}.{call} was refused: some weights are quantized, "
            f"first {names[0]!r} ({len(names)} in all). They hold codes, not values, and a cast "
            "would destroy them. Nothing was changed. Move without a dtype; or get the values with "
            "qmove.dequantize_and_move(model, device, dtype)."
        )


def _set_memory_format(model: nn.Module, memory_format: torch.memory_format) -> None:
    """As `nn.Module.to` does it, but quantized weights stay as they are."""
    with torch.no_grad():
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.dim() in (4, 5) and not is_quantized(tensor):
                tensor.data = tensor.data.to(memory_format=memory_format)


def _members(cls: type) -> dict[str, Any]:
    def reduce_ex(self: Any, protocol: Any) -> Any:
        """Copies and pickles have what the model had in its `__dict__`."""
        function, arguments, *rest = reduce_as_own_class(self, cls, protocol)
        if rest and isinstance(rest[0], dict):
            rest[0] = {key: value for key, value in rest[0].items() if key != METHODS_BEFORE}
        return function, arguments, *rest

    return {
        "__class__": property(own_class),  # what programs ask for the class, pickle among them
        "__reduce_ex__": reduce_ex,
        **{
            name: _Method(name, function, cls)
            for name, (function, always) in _METHODS.items()
            if always or hasattr(cls, name)
        },
    }


_enabled = Variants(_members)


def _bound(cls: type, name: str, model: Any) -> Original:
    """The method of the class; where it has none, calling it says so."""
    return lambda *args, **kwargs: getattr(cls, name)(model, *args, **kwargs)


class _Method:
    """A method of an enabled model.

    A data descriptor: it comes before a method that the model had in its `__dict__`, which stays
    there. One that was set since comes first: accelerate wraps the enabled method so.
    """

    def __init__(self, name: str, function: Callable[..., Any], cls: type) -> None:
        def method(model: Any, *args: Any, **kwargs: Any) -> Any:
            before = model.__dict__.get(METHODS_BEFORE, {})
            original = before[name] if name in before else _bound(cls, name, model)
            if not is_enabled(model):  # a wrapper around this method is still there
                return original(*args, **kwargs)
            with homes.lock:
                return function(model, original, *args, **kwargs)

        self._name, self._method = name, method
        if hasattr(cls, name):
            functools.update_wrapper(method, getattr(cls, name))

    def __get__(self, model: Any, owner: type) -> Any:
        if model is None:
            return self._method
        attributes, name = model.__dict__, self._name
        before = attributes.get(METHODS_BEFORE, {})
        if name in attributes and attributes[name] is not before.get(name, self):
            return attributes[name]
        return MethodType(self._method, model)

    def __set__(self, model: Any, method: Any) -> None:
        model.__dict__[self._name] = method

    def __delete__(self, model: Any) -> None:
        try:
            del model.__dict__[self._name]
        except KeyError:
            raise AttributeError(self._name) from None
