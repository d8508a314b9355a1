"""What people call a model: int8, nf4, bf16; and how much of it a dispatch keeps on the disk or in RAM."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

import qmove_core as qmove
from qmove_core.integrations import accelerate_dispatch
from qmove_core.integrations.weights_map import Sources, Unusable
from qmove_core.model.quantized import is_quantized, is_quantizing_wrapper

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
    kind: "int8", "nf4", "bf16" and the like; of several the one with the most bytes, a quantized one first.
    on_disk: bytes that a dispatch keeps in files.
    offloaded: bytes that a dispatch keeps in RAM.
    """

    kind: str = ""
    on_disk: int = 0
    offloaded: int = 0


def describe(held: qmove.Inventory) -> Description:
    """Describes a model by what it holds; reads no weights."""
    on_disk, offloaded = _kept_elsewhere(held)
    return Description(_kind(held), on_disk, offloaded)


def _kind(held: qmove.Inventory) -> str:
    plain: Counter[str] = Counter()
    quantized: Counter[str] = Counter()
    with torch._C.DisableTorchFunctionSubclass():
        for holding in held.holdings:
            tensor = next(
                (tensor for tensor in holding.tensors if is_quantized(tensor, holding.kind)), None
            )
            if tensor is not None:
                quantized[_format_of(tensor)] += holding.nbytes
            elif (
                holding.name.rsplit(".", 1)[-1] == "qweight" and not holding.dtype.is_floating_point
            ):
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
    quant_type = getattr(
        getattr(tensor, "quant_state", None), "quant_type", None
    )  # bitsandbytes, 4 bit
    if quant_type:
        return str(quant_type)
    for attribute in ("qtype", "tensor_type"):  # quanto; GGUF
        name = getattr(getattr(tensor, attribute, None), "name", None)
        if name:
            return str(name)
    if hasattr(type(tensor), "__tensor_flatten__"):
        return f"{type(tensor).__module__.partition('.')[0]} {type(tensor).__name__}"
    return _short(tensor.dtype)


def _short(dtype: torch.dtype) -> str:
    return _SHORT.get(dtype, str(dtype).removeprefix("torch."))


def _kept_elsewhere(held: qmove.Inventory) -> tuple[int, int]:
    """Bytes on the disk and in RAM that a dispatch fetches for each forward."""
    if not held.meta:
        return 0, 0
    on_disk = offloaded = 0
    sources = Sources()
    for slot in accelerate_dispatch.slots(held.modules):
        try:
            in_file = sources.find(slot.hook.weights_map, slot.key).file is not None
        except Unusable:  # materialize says why; here it only counts as not in RAM
            in_file = True
        if in_file:
            on_disk += slot.tensor.nbytes
        else:
            offloaded += slot.tensor.nbytes
    return on_disk, offloaded
