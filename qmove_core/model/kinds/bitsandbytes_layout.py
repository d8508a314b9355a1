"""Where bitsandbytes keeps what belongs to a quantized weight: in memory, and in a file.

Source: `QuantState`, `Params4bit`, `Int8Params` and `Linear8bitLt._save_to_state_dict` of
bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

QUANT_TYPES = ("nf4", "fp4")

# The tensors of a 4-bit quant state: what a file calls each, behind the weight's own name, and
# where it is in memory.
QUANT_STATE = {
    "absmax": "quant_state.absmax",
    "quant_map": "quant_state.code",
    "nested_absmax": "quant_state.state2.absmax",
    "nested_quant_map": "quant_state.state2.code",
}
# The rest of a quant state, packed into one tensor of bytes: its name in a file, behind the
# weight's own.
PACKED_STATE = {kind: f"quant_state.bitsandbytes__{kind}" for kind in QUANT_TYPES}


def is_of(tensor: torch.Tensor, class_name: str) -> bool:
    """Whether it is an "Int8Params" or "Params4bit" of bitsandbytes. Imports nothing."""
    return any(
        cls.__name__ == class_name and cls.__module__.startswith("bitsandbytes")
        for cls in type(tensor).__mro__
    )


def saved_name(name: str) -> str | None:
    """The name in a file of the part of a weight that `name` reaches in memory; else None."""
    if name.endswith(".weight.SCB"):
        return name.removesuffix(".weight.SCB") + ".SCB"
    for in_file, in_memory in QUANT_STATE.items():
        if name.endswith(f".{in_memory}"):
            return name.removesuffix(in_memory) + in_file
    return None


def quant_state_of(module: Any) -> Any:
    """The quant state of a 4-bit layer; None if it has none. FSDP leaves it on the module alone."""
    on_weight = getattr(module.weight, "quant_state", None)
    return module.__dict__.get("quant_state") if on_weight is None else on_weight


def row_scales_of(module: Any, weight: Any) -> Any:
    """The scales (SCB) of an 8-bit layer, on its weight or, after a forward, its state."""
    on_weight = getattr(weight, "SCB", None)
    state = getattr(module, "state", None)
    return getattr(state, "SCB", None) if on_weight is None else on_weight


def with_nested(state: Any) -> Iterator[Any]:
    """A quant state, and the state that its scales are quantized with, if they are."""
    while hasattr(state, "absmax"):
        yield state
        state = getattr(state, "state2", None)


def awaits_quantization(weight: Any) -> bool:
    """Whether a weight still has the plain values that it is to be quantized from."""
    if hasattr(weight, "bnb_quantized"):
        return not weight.bnb_quantized and weight.quant_state is None
    return weight.is_floating_point() and not weight.has_fp16_weights


def is_packed_for_cpu(weight: Any) -> bool:
    """Whether a `Params4bit` has the layout of the AVX512-BF16 kernels (since 0.49)."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))
