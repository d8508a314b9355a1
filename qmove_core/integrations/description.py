"""What people call a model (int8, nf4, bf16), and how much of it a dispatch keeps elsewhere."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from ..model.holdings import Inventory
from ..model.quantized import is_quantized, is_quantizing_wrapper
from . import accelerate_dispatch
from .weights_map import Sources, Unusable

_SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8 e4m3",
    torch.float8_e5m2: "fp8 e5m2",
}


@dataclass(frozen=True)
class Description:
    """Attributes:
    kind: "int8", "nf4", "bf16" and the like: the format of most bytes; quantized ones come first.
    on_disk: bytes that a dispatch keeps in files.
    offloaded: bytes that a dispatch keeps in RAM.
    """

    kind: str = ""
    on_disk: int = 0
    offloaded: int = 0


def describe(held: Inventory) -> Description:
    """Describes a model by its inventory (`qmove.inventory`). Reads no weights."""
    return Description(_kind(held), *_kept_elsewhere(held))


def _kind(held: Inventory) -> str:
    plain: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    with torch._C.DisableTorchFunctionSubclass():
        for holding in held.holdings:
            weights = [tensor for tensor in holding.tensors if is_quantized(tensor, holding.kind)]
            is_packed = holding.name.rpartition(".")[2] == "qweight"
            if weights:
                quantized[_format_of(weights[0])] += holding.nbytes
            elif is_packed and not holding.dtype.is_floating_point:
                quantized["GPTQ or AWQ"] += holding.nbytes
            elif holding.kind in ("parameter", "buffer", "tensor", "attribute"):
                plain[_short(holding.dtype)] += holding.nbytes
        for _name, wrapper in held.wrappers:
            if is_quantizing_wrapper(wrapper):
                quantized[_format_of(wrapper)] += wrapper.numel()
        if not plain and not quantized:
            for meta in held.meta:
                plain[_short(meta.dtype)] += meta.nbytes
    counted = quantized or plain
    return counted.most_common(1)[0][0] if counted else ""


def _format_of(tensor: Any) -> str:
    """The format of a quantized tensor, as its library calls it."""
    # bitsandbytes' 4 bit; quanto; GGUF
    for path in ("quant_state.quant_type", "qtype.name", "tensor_type.name"):
        value = tensor
        for name in path.split("."):
            value = getattr(value, name, None)
        if value:
            return str(value)
    if hasattr(type(tensor), "__tensor_flatten__"):
        return f"{type(tensor).__module__.partition('.')[0]} {type(tensor).__name__}"
    return _short(tensor.dtype)


def _short(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _kept_elsewhere(held: Inventory) -> tuple[int, int]:
    """Bytes on disk and in RAM that a dispatch fetches for each forward."""
    if not held.meta:
        return 0, 0
    on_disk = offloaded = 0
    sources = Sources()
    for slot in accelerate_dispatch.slots(held.modules):
        try:
            in_file = sources.find(slot.hook.weights_map, slot.key).file is not None
        except Unusable:  # materialize gives the reason; here it only counts as not in RAM
            in_file = True
        if in_file:
            on_disk += slot.tensor.nbytes
        else:
            offloaded += slot.tensor.nbytes
    return on_disk, offloaded
