"""bitsandbytes weights in a dispatch: accelerate sends what hangs on a weight to the meta device together with it.

With 4 bits every later forward fails, since the quant state is not fetched again; with 8 bits the scales come back, and copies
of weights stay resident. The weights map has all of it under names of its own, so it can be hung on the weight again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

_QUANT_STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_PACKED = tuple(f"quant_state.bitsandbytes__{quant_type}" for quant_type in ("nf4", "fp4"))


def part_keys(tensor: torch.Tensor, key: str, has: Callable[[str], bool]) -> dict[str, str]:
    """Under which keys a weights map has what belongs to `tensor`, whose own key is `key`; by the name of the part.

    Empty for all weights but those of bitsandbytes.
    """
    if _is(tensor, "Int8Params"):
        return {"SCB": f"{key.removesuffix('weight')}SCB"}
    if _is(tensor, "Params4bit") and getattr(tensor, "quant_state", None) is not None:
        found = {part: f"{key}.{part}" for part in (*_QUANT_STATE, *_PACKED)}
        return {
            part: name
            for part, name in found.items()
            if has(name) or part in ("absmax", "quant_map")
        }
    return {}


def tensors_on(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """What hangs on a weight and went to meta with it."""
    if _is(tensor, "Int8Params"):
        parts = [getattr(tensor, "CB", None), getattr(tensor, "SCB", None)]
    elif _is(tensor, "Params4bit"):
        parts = list(_of_quant_state(getattr(tensor, "quant_state", None)))
    else:
        parts = []
    return (part for part in parts if part is not None)


def current_parts(tensor: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that say how the codes of a weight are to be read, by name."""
    if _is(tensor, "Int8Params"):
        scales = getattr(tensor, "SCB", None)
        scales = (
            scales if scales is not None else getattr(getattr(module, "state", None), "SCB", None)
        )
        return {} if scales is None else {"SCB": scales}
    return {f"quant_state[{i}]": part for i, part in enumerate(tensors_on(tensor))}


def attach(
    tensor: torch.Tensor, module: nn.Module, parts: Mapping[str, torch.Tensor]
) -> Callable[[], None]:
    """Hangs `parts` on a weight, as bitsandbytes does after loading a checkpoint. Returns what takes them off again."""
    return (
        _attach_8bit(tensor, module, parts)
        if _is(tensor, "Int8Params")
        else _attach_4bit(tensor, module, parts)
    )


def _attach_8bit(
    tensor: Any, module: nn.Module, parts: Mapping[str, torch.Tensor]
) -> Callable[[], None]:
    state = getattr(module, "state", None)
    before = {name: tensor.__dict__.get(name) for name in ("CB", "SCB")}
    state_before = (state.CB, state.SCB) if state is not None else (None, None)
    with torch._C.DisableTorchFunctionSubclass():
        tensor.CB = (
            tensor.detach()
        )  # the first forward takes CB and SCB over into the layer's state
    tensor.SCB = parts["SCB"]
    if state is not None:
        state.CB = state.SCB = None

    def detach() -> None:
        tensor.__dict__.update(before)
        if state is not None:
            state.CB, state.SCB = state_before

    return detach


def _attach_4bit(
    tensor: Any, module: nn.Module, parts: Mapping[str, torch.Tensor]
) -> Callable[[], None]:
    from bitsandbytes.functional import QuantState

    quant_state = tensor.quant_state  # the module refers to the same object
    before, quantized_before = dict(quant_state.__dict__), tensor.bnb_quantized
    quant_state.__dict__.update(QuantState.from_dict(dict(parts), tensor.device).__dict__)
    tensor.bnb_quantized = True

    def detach() -> None:
        quant_state.__dict__.clear()
        quant_state.__dict__.update(before)
        tensor.bnb_quantized = quantized_before

    return detach


def _of_quant_state(state: Any) -> Iterable[torch.Tensor]:
    while state is not None:
        yield from (
            part
            for part in (state.absmax, state.code, state.offset)
            if isinstance(part, torch.Tensor)
        )
        state = state.state2


def _is(tensor: torch.Tensor, class_name: str) -> bool:
    return any(
        cls.__name__ == class_name and cls.__module__.startswith("bitsandbytes")
        for cls in type(tensor).__mro__
    )
