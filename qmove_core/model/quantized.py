"""Tells which weights of a model are quantized, by what it holds: libraries' flags can be stale."""

from __future__ import annotations

import torch
from torch import nn

from .holdings import Inventory


def quantized_weights(held: Inventory) -> list[str]:
    """The names of all quantized weights; empty for a model in full or half precision.

    A weight is quantized that is a parameter of one byte or less per element (int8, uint8, int4,
    fp8, ...), an fp8 or fp4 buffer, a bitsandbytes weight with its quant state (whose storage may
    have a float dtype), a wrapper subclass from outside PyTorch, or the packed `qweight` of GPTQ
    and AWQ.
    """
    names = []
    with torch._C.DisableTorchFunctionSubclass():
        for holding in held.holdings:
            is_packed = (
                holding.kind in ("parameter", "buffer")
                and not holding.dtype.is_floating_point
                and holding.name.rsplit(".", 1)[-1] == "qweight"
            )
            if is_packed or any(is_quantized(tensor, holding.kind) for tensor in holding.tensors):
                names.append(holding.name)
        names += [name for name, wrapper in held.wrappers if is_quantizing_wrapper(wrapper)]
    return names


def is_quantized(tensor: torch.Tensor, kind: str = "parameter") -> bool:
    if getattr(tensor, "bnb_quantized", False) or getattr(tensor, "quant_state", None) is not None:
        return True
    small = tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool
    return small and (
        isinstance(tensor, nn.Parameter) or (kind == "buffer" and tensor.dtype.is_floating_point)
    )


def is_quantizing_wrapper(tensor: torch.Tensor) -> bool:
    """Whether it is of a wrapper subclass that quantizes: PyTorch's own (DTensor, ...) do not."""
    cls = type(tensor)
    return hasattr(cls, "__tensor_flatten__") and not cls.__module__.startswith("torch.")
