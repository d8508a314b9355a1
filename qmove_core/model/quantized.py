"""Tells which weights of a model are quantized, by what it holds: libraries' flags can be stale."""

from __future__ import annotations

import torch
from torch import nn

from .holdings import Inventory

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32)
_PACKED_NAMES = ("qweight", "weight_packed", "weight")


def quantized_weights(held: Inventory) -> list[str]:
    """The names of all quantized weights; empty for a model in full or half precision.

    A weight is quantized that is a parameter of one byte or less per element (int8, uint8, int4,
    fp8, ...) or of int16 or int32 (several codes in one number), an fp8 or fp4 buffer, a
    bitsandbytes weight with its quant state (whose storage may have a float dtype), a wrapper
    subclass from outside PyTorch, or a buffer of integers under the name of a weight: `qweight` of
    GPTQ and AWQ, `weight_packed` of compressed-tensors, `weight` of BitNet.
    """
    names = []
    with torch._C.DisableTorchFunctionSubclass():
        for holding in held.holdings:
            is_packed = (
                holding.kind in ("parameter", "buffer")
                and holding.dtype in _INTEGERS
                and holding.name.rsplit(".", 1)[-1] in _PACKED_NAMES
            )
            if is_packed or any(is_quantized(tensor, holding.kind) for tensor in holding.tensors):
                names.append(holding.name)
        names += [name for name, wrapper in held.wrappers if is_quantizing_wrapper(wrapper)]
    return names


def is_quantized(tensor: torch.Tensor, kind: str = "parameter") -> bool:
    if getattr(tensor, "bnb_quantized", False) or getattr(tensor, "quant_state", None) is not None:
        return True
    if isinstance(tensor, nn.Parameter) and tensor.dtype in _INTEGERS:
        return True
    small = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
    return small and (
        isinstance(tensor, nn.Parameter) or (kind == "buffer" and tensor.dtype.is_floating_point)
    )


def is_quantizing_wrapper(tensor: torch.Tensor) -> bool:
    """Whether it is of a wrapper subclass that quantizes: PyTorch's own (DTensor, ...) do not."""
    cls = type(tensor)
    return hasattr(cls, "__tensor_flatten__") and not cls.__module__.startswith("torch.")
