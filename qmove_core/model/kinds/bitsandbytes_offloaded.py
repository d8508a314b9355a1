"""bitsandbytes weights in a dispatch: accelerate sends their scales to the meta device too.

With 4 bits every later forward fails, since the quant state is not fetched again; with 8 bits the
scales come back, and copies of weights stay resident. The weights map has all of it under names of
its own, so the weight can get its parts back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ...attributes import Undo, set_aside
from .bitsandbytes_layout import (
    PACKED_STATE,
    QUANT_STATE,
    is_of,
    row_scales_of,
    with_nested,
)


def part_keys(tensor: torch.Tensor, key: str, has: Callable[[str], bool]) -> dict[str, str]:
    """The keys in a weights map of the parts of `tensor`, whose own key is `key`; by part.

    Empty for all weights but those of bitsandbytes.
    """
    if is_of(tensor, "Int8Params"):
        return {"SCB": f"{key.removesuffix('weight')}SCB"}
    if is_of(tensor, "Params4bit") and getattr(tensor, "quant_state", None) is not None:
        found = {part: f"{key}.{part}" for part in (*QUANT_STATE, *PACKED_STATE.values())}
        return {
            part: name
            for part, name in found.items()
            if has(name) or part in ("absmax", "quant_map")
        }
    return {}


def tensors_on(tensor: Any) -> Iterable[torch.Tensor]:
    """The parts of a weight, which went to the meta device with it."""
    parts = []
    if is_of(tensor, "Int8Params"):
        parts = [getattr(tensor, name, None) for name in ("CB", "SCB")]
    elif is_of(tensor, "Params4bit"):
        for state in with_nested(tensor.quant_state):
            parts += [state.absmax, state.code, state.offset]
    return (part for part in parts if isinstance(part, torch.Tensor))


def current_parts(tensor: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that say how the codes of a weight are to be read, by name."""
    if is_of(tensor, "Int8Params"):
        scales = row_scales_of(module, tensor)
        return {} if scales is None else {"SCB": scales}
    return {f"quant_state[{i}]": part for i, part in enumerate(tensors_on(tensor))}


def attach(tensor: Any, module: nn.Module, parts: Mapping[str, torch.Tensor], undo: Undo) -> None:
    """Gives a weight its `parts`, as loading a checkpoint does. `undo` gets what takes them off."""
    if is_of(tensor, "Params4bit"):
        from bitsandbytes.functional import QuantState
        from bitsandbytes.utils import unpack_tensor_to_dict

        quant_state = tensor.quant_state  # the module refers to the same object
        read = QuantState.from_dict(dict(parts), tensor.device)
        if read.offset is not None and read.offset.dtype != torch.float32:
            # It was made in PyTorch's default dtype, which may be coarser.
            packed = next(part for name, part in parts.items() if name in PACKED_STATE.values())
            offset = unpack_tensor_to_dict(packed)["nested_offset"]
            read.offset = torch.tensor(offset, dtype=torch.float32, device=tensor.device)
        set_aside(undo, quant_state, **vars(read))
        set_aside(undo, tensor, bnb_quantized=True)
        return
    with torch._C.DisableTorchFunctionSubclass():
        codes = tensor.detach()  # the first forward takes CB and SCB over into the layer's state
    set_aside(undo, tensor, CB=codes, SCB=parts["SCB"])
    if "state" in module.__dict__:
        set_aside(undo, module.state, CB=None, SCB=None)
