"""Dequantizes a model, to merge adapters or where kernels are missing, and quantizes it again."""

from __future__ import annotations

import functools
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from .. import devices
from ..actions import Action
from ..attributes import Undo
from ..class_variants import own_class
from ..devices import Device
from ..errors import CannotMove, is_out_of_host_memory, is_out_of_memory, readable_bytes
from ..interrupts import all_or_nothing, interrupts_deferred, not_a_failure
from ..memory import budget
from ..model.holdings import Inventory
from ..model.inventory import inventory
from ..model.quantized import quantized_weights
from ..model.walk import walk
from ..moving import moving
from ..parking import pins
from ..parking.plans import refuse_meta
from ..parking.requests import move
from ..tracebacks import clear_own_frames
from .layer_changes import Change, carry_out
from .layer_formats import Recipe, format_of

log = logging.getLogger("qmove")

Model = TypeVar("Model")

_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # dequantized layer -> its Recipe
_dtypes_before = WeakTensorKeyDictionary()  # other tensor that was cast along -> its dtype before


@moving()
def dequantize_and_move(model: Model, device: Device, dtype: torch.dtype | None = None) -> Model:
    """Gives quantized layers plain weights of the same values, and moves the model to `device`.

    What the quantization has lost stays lost: the weights are the quantization's own values, code *
    scale, rounded once to `dtype`. In `dtype=torch.float32` that rounding is gone too. The layers
    become `nn.Linear` and `nn.Embedding` in place (quanto's: subclasses that compute like those):
    the same module objects, shared ones still shared. The model's own flags and config still call
    it quantized. A model without quantized weights is just moved, and cast if `dtype` says so.

    The quantized weights are freed at the end, so that a failure costs nothing: `device` needs room
    for the full-precision model, and for the quantized one as well if that lies there too; any
    other device for no byte more.

    Args:
        model: a module, a pipeline, a list or dict of them; it may be parked.
        device: "cpu", "cuda:0", ...
        dtype: of the new weights. None: that of the model's first parameter that is not quantized,
            in which its activations come; for a model without one, what it was quantized from.
            Another dtype than that is given to all parameters and buffers that have it.

    Returns:
        The same model object, awake on `device`.

    Raises:
        NotEnoughMemory, UnknownDevice, MetaTensorsPresent, LiveAutogradGraph: as `move`.
        CannotMove: some weights cannot be dequantized, with names and reasons.

    After an error the model is as it was, where it was.
    """
    involved = _dequantize(model, devices.resolve(device), dtype)
    _release_cached(involved)  # by now nothing refers to the quantized weights
    return model


@moving()
def move_and_requantize(model: Model, device: Device) -> Model:
    """Quantizes again, on `device`, what `dequantize_and_move` dequantized, with the same options.

    Weights that did not change in between come back with the very same values if they were int8 or
    4 bit without double quantization. Double quantization quantizes the scales a second time: an
    error of at most 0.2 % of the largest weight in a float16 model, 0.5 % in a bfloat16 one, and
    0.03 % and 0.07 % of the weights' norm. If the weights went through a dtype that is coarser than
    the model's own, its rounding comes on top: up to 0.6 % and 0.2 % for bfloat16. (Measured with
    normally distributed weights, bitsandbytes 0.50.2, CPU kernels.) A model that is quantized
    already is just moved.

    The plain weights are freed at the end, so that a failure costs nothing: `device` needs room for
    the quantized model, and for the plain one as well if that lies there too.

    Args:
        model: what `dequantize_and_move` was given, changed or not. A copy of it will not do.
        device: "cuda:0", ...

    Returns:
        The same model object, awake on `device`.

    Raises:
        NotEnoughMemory, UnknownDevice, MetaTensorsPresent, LiveAutogradGraph: as `move`.
        CannotMove: nothing was dequantized by qmove, or a format cannot be built again (torchao),
            with names and reasons.

    After an error the model is as it was, where it was.
    """
    _release_cached(_requantize(model, devices.resolve(device)))
    return model


def _release_cached(involved: set[torch.device]) -> None:
    with interrupts_deferred() as later, not_a_failure(later, "give memory back to the driver"):
        devices.release_cached(involved)


@dataclass(frozen=True)
class _Work:
    """One layer to be changed.

    Attributes:
        recipe: of the quantized layer that it is, or is to be.
        holders: the objects that hold its weights now; afterwards nothing of the model does.
        numel: its number of weights.
        dtype: of the plain weights.
        nbytes: of the new weights.
        change: makes the new weights, where `made` does not have them, and says what is to change.
    """

    name: str
    module: nn.Module
    recipe: Recipe
    holders: list[object]
    numel: int
    dtype: torch.dtype
    nbytes: int
    change: Callable[[dict[int, nn.Parameter]], Change]


Casts = list[tuple[torch.Tensor, torch.dtype]]  # what changes its dtype along with the layers


def _dequantize(
    model: object, target: torch.device, dtype: torch.dtype | None
) -> set[torch.device]:
    held, action = inventory(model), Action("dequantize", model, f"to {target}")
    refuse_meta(action, held)
    pins.refuse(action, held.holdings, target)
    work, reasons = [], []
    for name, module, working_dtype in _modules(held):
        layer_format = format_of(module)
        if layer_format is None:
            continue
        if obstacle := layer_format.obstacle(module):
            reasons.append((name, obstacle))
            continue
        recipe, numel = layer_format.recipe(module), layer_format.numel(module)
        wanted = dtype or working_dtype or recipe.dtype
        holders = layer_format.holders(module)
        change = functools.partial(layer_format.dequantize, module, target, wanted)
        nbytes = numel * wanted.itemsize
        work.append(_Work(name, module, recipe, holders, numel, wanted, nbytes, change))
    _refuse(action, reasons)
    replaced = _tensors_of(work)
    known = {
        name for h in held.holdings if any(id(t) in replaced for t in h.tensors) for name in h.names
    }
    known |= {name for name, wrapper in held.wrappers if id(wrapper) in replaced}
    unknown = "qmove knows no way from this format to the values; its own library may have one"
    _refuse(action, [(name, unknown) for name in quantized_weights(held) if name not in known])
    casts = _casts_along(held, work, replaced, dtype)
    dtypes_before = [(tensor, tensor.dtype) for tensor, _dtype in casts]

    def note_recipes() -> None:
        for item in work:
            _recipes[item.module] = item.recipe
        for tensor, before in dtypes_before:
            _dtypes_before.setdefault(tensor, before)

    with _keeping_nothing():
        _transform(model, action, held, target, work, casts, note_recipes)
    return {holding.device for holding in held.holdings}


def _requantize(model: object, target: torch.device) -> set[torch.device]:
    held, action = inventory(model), Action("requantize", model, f"on {target}")
    refuse_meta(action, held)
    pins.refuse(action, held.holdings, target)
    work, reasons = [], []
    for name, module, _working_dtype in _modules(held):
        if module in _recipes and format_of(module) is None:
            recipe: Recipe = _recipes[module]
            if reason := recipe.format.irreversible(recipe):
                reasons.append((name, reason))
                continue
            weight: Any = module.weight
            numel = weight.numel()
            nbytes = recipe.format.nbytes(recipe, numel)
            change = functools.partial(recipe.format.quantize, module, recipe, target)
            work.append(_Work(name, module, recipe, [weight], numel, weight.dtype, nbytes, change))
    _refuse(action, reasons)
    if not work and not quantized_weights(held):
        reason = (
            "qmove.dequantize_and_move has dequantized none of its layers; "
            "quantize it with its own library"
        )
        _refuse(action, [(type(model).__name__, reason)])
    replaced = _tensors_of(work)
    casts = [
        (tensor, _dtypes_before[tensor])
        for root, _dtype in _roots(held)
        for tensor in (*root.parameters(), *root.buffers())
        if tensor in _dtypes_before and id(tensor) not in replaced
    ]

    def forget_recipes() -> None:
        for item in work:
            _recipes.pop(item.module, None)
        for tensor, _before in casts:
            _dtypes_before.pop(tensor, None)

    with _keeping_nothing():
        _transform(model, action, held, target, work, casts, forget_recipes)
    return {holding.device for holding in held.holdings}


@contextmanager
def _keeping_nothing() -> Iterator[None]:
    """Whoever keeps an error of the body keeps none of the weights that were made until then."""
    try:
        yield
    except BaseException as error:
        clear_own_frames(error)
        gc.collect()  # weights of bitsandbytes that were not finished refer to themselves
        raise


def _transform(
    model: object,
    action: Action,
    held: Inventory,
    target: torch.device,
    work: Sequence[_Work],
    casts: Casts,
    on_commit: Callable[[], None],
) -> None:
    """Makes all layers anew on `target` and moves the rest of the model there: all, or nothing.

    `on_commit` notes it.
    """
    started = time.perf_counter()
    needed = _check_budget(action, held, target, work, casts)
    made: dict[int, nn.Parameter] = {}
    try:
        # What is made under inference mode could never be trained. A parked weight is read where it
        # is, and does not come home for it.
        with torch.no_grad(), torch.inference_mode(False), torch._C.DisableTorchFunctionSubclass():
            changes = [_made(item, action, made) for item in work]
            new_data = [(tensor, tensor.data.to(target, dtype)) for tensor, dtype in casts]
    except BaseException as error:
        made.clear()
        if is_out_of_host_memory(error):
            raise budget.out_of_host_memory(action, needed, error) from error
        if not is_out_of_memory(error):
            raise
        advice = "Park another model first, or choose another device."
        raise budget.out_of_memory(action, target, needed, advice) from error
    undo = Undo()

    def commit() -> None:
        for change in changes:
            carry_out(change, undo)
        for tensor, values in new_data:
            with torch._C.DisableTorchFunctionSubclass():
                undo.note(_assign, tensor, tensor.data)
            _assign(tensor, values)
        move(model, target)
        on_commit()

    with interrupts_deferred():
        all_or_nothing(commit, undo.undo)
    nbytes, seconds = sum(item.nbytes for item in work), time.perf_counter() - started
    log.info(
        "%s: %d layers, now %s, in %.2f s",
        action.gerund,
        len(work),
        readable_bytes(nbytes),
        seconds,
    )


def _made(item: _Work, action: Action, made: dict[int, nn.Parameter]) -> Change:
    """The change of one layer, with the layer's name in what making it raises.

    Handlers of signals are called after it: what they raise is no failure of the layer's.
    """
    with interrupts_deferred():
        try:
            return item.change(made)
        except Exception as error:  # another library's code may raise anything; nothing has changed
            if is_out_of_memory(error) or is_out_of_host_memory(error):
                raise
            raise CannotMove(action, [(item.name, f"{type(error).__name__}: {error}")]) from error


def _check_budget(
    action: Action, held: Inventory, target: torch.device, work: Sequence[_Work], casts: Casts
) -> int:
    """Checks and returns the bytes needed: new weights, one layer to make it from, and the rest."""
    gone = _tensors_of(work) | {id(tensor) for tensor, _dtype in casts}
    needed = sum(item.nbytes for item in work) + max((item.numel * 4 for item in work), default=0)
    needed += sum(tensor.numel() * dtype.itemsize for tensor, dtype in casts)
    needed += sum(
        h.nbytes
        for h in held.holdings
        if h.device != target and not any(id(t) in gone for t in h.tensors)
    )
    if target.type == "cpu":  # `ram_limit` is about parked bytes; those here are to be used
        budget.require_host(action, needed, None)
    else:
        budget.make_room({target: needed})
        budget.require_device(action, needed, target)
    return needed


def _roots(held: Inventory) -> list[tuple[nn.Module, torch.dtype | None]]:
    """The modules inside no other (the model, components of a pipeline), and their working dtype.

    That is the dtype of the first parameter that is not quantized: by it transformers and diffusers
    name a model's dtype.
    """
    inner = {id(child) for module in held.modules.values() for child in module.children()}
    roots = [module for module in held.modules.values() if id(module) not in inner]
    return [
        (root, next((p.dtype for p in root.parameters() if _is_plain(p)), None)) for root in roots
    ]


def _is_plain(parameter: nn.Parameter) -> bool:
    return (
        own_class(parameter) is nn.Parameter
        and parameter.is_floating_point()
        and parameter.dtype.itemsize > 1
    )


def _modules(held: Inventory) -> Iterator[tuple[str, nn.Module, torch.dtype | None]]:
    """Every module of the model with its name and the working dtype of its root."""
    names = {id(module): name for name, module in held.modules.items()}
    for root, dtype in _roots(held):
        for module in root.modules():
            if id(module) in names:
                yield names.pop(id(module)), module, dtype


def _tensors_of(work: Iterable[_Work]) -> set[int]:
    """The ids of all tensors that the layers' present weights consist of."""
    return set(walk([("", holder) for item in work for holder in item.holders]).tensors)


def _casts_along(
    held: Inventory, work: Sequence[_Work], replaced: set[int], dtype: torch.dtype | None
) -> Casts:
    """What must be cast for the new layers: their biases, and all that has the dtype given up."""
    casts: dict[int, tuple[torch.Tensor, torch.dtype]] = {}
    for root, before in _roots(held):
        for tensor in (*root.parameters(), *root.buffers()):
            if dtype is not None and tensor.dtype == before and id(tensor) not in replaced:
                casts[id(tensor)] = tensor, dtype
    for item in work:
        bias: Any = getattr(item.module, "bias", None)
        if bias is not None:
            casts[id(bias)] = bias, item.dtype
    return [(tensor, wanted) for tensor, wanted in casts.values() if tensor.dtype != wanted]


def _assign(tensor: torch.Tensor, values: torch.Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        is_inference = tensor.is_inference()
        with torch.no_grad(), torch.inference_mode(is_inference):
            tensor.data = values


def _refuse(action: Action, reasons: Sequence[tuple[str, str]]) -> None:
    if reasons:
        raise CannotMove(action, reasons)
