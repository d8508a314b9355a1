"""Raw addresses: numbers that a model keeps of where its bytes lie. What they point to cannot move.

Kernels of GPTQ, ExLlama and the like keep `tensor.data_ptr()` as an integer, in a table of int64 or
in a ctypes object. After a move they would read memory that belongs to somebody else.
"""

from __future__ import annotations

import bisect
import ctypes
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..homes import place_of
from .holdings import Holding

LEAST = 1 << 24  # no allocator gives an address below it, and counts and sizes rarely exceed it
_LONGEST_TABLE = 4096  # numbers; a longer tensor or array is data

# Layers whose kernels keep addresses in C++, where nobody can look: by the name of their class or
# module (`auto_gptq.nn_modules.qlinear.qlinear_exllama.QuantLinear`), and the attribute that says
# so.
_KNOWN = re.compile("exllama|bitblas", re.IGNORECASE)
# accelerate's hooks tell tied weights by their addresses, and GPTQModel's kernels in Python whether
# what they have unpacked is still true; nothing is read there.
_NO_POINTER = re.compile(r"\.tied_(params_map|pointers_to_remove)\b|_cache_state\b|\.qweight_ptr\b")
_HANDLES = ("q4", "q_handle", "q_params", "q_tensors", "bitblas_matmul")
# In any class: an object in C++ under one of these names has the addresses of the layer's weights.
_HANDLES_ANYWHERE = ("q4", "q_handle", "q_params")


def numbers_in(obj: Any) -> Iterator[int]:
    """The numbers in a ctypes object or a numpy array that may be addresses."""
    if isinstance(obj, ctypes.Array):
        yield from (number for item in obj for number in numbers_in(item))
    elif isinstance(obj, int):
        if obj >= LEAST:
            yield obj
    elif isinstance(obj, ctypes._SimpleCData):
        yield from numbers_in(obj.value or 0) if not isinstance(obj.value, bytes) else ()
    elif isinstance(obj, ctypes._Pointer):
        yield ctypes.cast(obj, ctypes.c_void_p).value or 0
    elif obj.dtype.kind in ("i", "u") and obj.itemsize == 8 and obj.size <= _LONGEST_TABLE:
        yield from (number for number in obj.reshape(-1).tolist() if number >= LEAST)


def pointed_to(
    holdings: Sequence[Holding], numbers: Iterable[tuple[str, int]]
) -> dict[int, tuple[Holding, str]]:
    """The holdings on accelerators that one of these (name, number) points into, by their ids, with
    the name."""
    numbers = [
        pair for pair in (*numbers, *_in_tables(holdings)) if not _NO_POINTER.search(pair[0])
    ]
    if not numbers:  # nearly always: so no address is asked for
        return {}
    # What is under way to a device has no address there yet, and is not waited for.
    there = [
        (h.storage.data_ptr(), h)
        for h in holdings
        if h.device.type != "cpu" and h.nbytes and place_of(h.tensors[0]).type != "cpu"
    ]
    there.sort(key=lambda pair: pair[0])
    starts = [start for start, _holding in there]
    found: dict[int, tuple[Holding, str]] = {}
    for name, number in numbers:
        index = bisect.bisect_right(starts, number) - 1
        if index >= 0 and number < starts[index] + there[index][1].nbytes:
            found.setdefault(id(there[index][1]), (there[index][1], name))
    return found


def _in_tables(holdings: Sequence[Holding]) -> Iterator[tuple[str, int]]:
    """What short tensors of int64 contain."""
    for holding in holdings:
        for tensor in holding.tensors:
            if (
                tensor.dtype in (torch.int64, torch.uint64)
                and tensor.dim()
                and holding.nbytes <= _LONGEST_TABLE * 8
                and not holding.lacks_bytes
            ):
                name = holding.name
                with torch._C.DisableTorchFunction():
                    numbers = torch.Tensor.reshape(tensor, -1).tolist()
                yield from ((name, number) for number in numbers if number >= LEAST)


def keeps_addresses(module: Any) -> bool:
    """Whether a layer is one of those known to keep addresses in C++, and does by now."""
    values = module.__dict__
    cls = type(module)
    if _KNOWN.search(f"{cls.__module__}.{cls.__qualname__}") is not None:
        return any(values.get(name) is not None for name in _HANDLES)
    return any(_is_handle(values[name]) for name in _HANDLES_ANYWHERE if name in values)


def _is_handle(value: Any) -> bool:
    """Whether a value is an address, or a list of them; small numbers are settings."""
    if isinstance(value, (list, tuple)):
        return any(map(_is_handle, value))
    if isinstance(value, (int, ctypes._SimpleCData)):
        return any(True for _ in numbers_in(value))
    return isinstance(value, ctypes._Pointer) and bool(value)
