"""Tensors whose bytes are still on their way: whoever uses one waits for it first.

While it is awaited a tensor has a subclass of its own class, whose `__torch_function__` every
operator, method and attribute goes through, `data_ptr()` for somebody's own kernel among them. What
only asks for shape, dtype or device is answered at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from ..class_variants import Variants, set_class

_waits: WeakTensorKeyDictionary = (
    WeakTensorKeyDictionary()
)  # an awaited tensor -> what waits for it, and releases it

_PROPERTIES = (
    "shape",
    "device",
    "dtype",
    "layout",
    "ndim",
    "requires_grad",
    "is_leaf",
    "is_cuda",
    "is_cpu",
    "is_meta",
)
_MORE_PROPERTIES = (
    "is_sparse",
    "is_quantized",
    "is_nested",
    "is_mkldnn",
    "is_mps",
    "is_xpu",
    "itemsize",
    "nbytes",
    "grad",
)
# Not `dim()`: it is what vmap asks for before it takes the tensor where no operator is seen.
_METHODS = (
    "size",
    "stride",
    "numel",
    "nelement",
    "element_size",
    "storage_offset",
    "is_contiguous",
    "__len__",
)
_MORE_METHODS = (
    "is_floating_point",
    "is_complex",
    "is_signed",
    "is_inference",
    "get_device",
    "_is_view",
)


def _asks_for_no_bytes() -> Iterator[Any]:
    for name in (*_PROPERTIES, *_MORE_PROPERTIES):
        yield getattr(torch.Tensor, name).__get__
    for name in (*_METHODS, *_MORE_METHODS):
        yield getattr(torch.Tensor, name)
    yield from (torch.is_floating_point, torch.is_complex, torch.numel)


_HARMLESS = frozenset(_asks_for_no_bytes())


def await_bytes(tensor: torch.Tensor, wait: Callable[[], None]) -> None:
    """Makes whoever uses `tensor` call `wait` first, which must `release` it.

    Raises:
        TypeError: a class that allows no subclass.
    """
    is_pending = _awaited.made(type(tensor))
    variant = type(tensor) if is_pending else _awaited.of(type(tensor))
    _waits[tensor] = wait  # first: another thread may use the tensor as soon as it has the class
    set_class(tensor, variant)


def release(tensor: torch.Tensor, wait: Callable[[], None] | None) -> None:
    """Gives a tensor that waits by `wait` its own class back. One that waits by another stays."""
    if _waits.get(tensor) is wait:
        _awaited.take(tensor)
        _waits.pop(tensor, None)


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """Waits first: `Parameter` makes a copy of the class that `self` has when it is asked."""
    _wait_for(self)
    return copy.deepcopy(self, memo)


def _torch_function(
    cls: type,
    func: Callable[..., Any],
    types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    kwargs = kwargs or {}
    if func in _HARMLESS:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    for value in tree_leaves((args, kwargs)):
        if _awaited.made(type(value)):
            _wait_for(value)
    return func(*args, **kwargs)


def _wait_for(tensor: Any) -> None:
    wait = _waits.get(tensor)
    if wait is not None:
        wait()
    release(tensor, wait)


_MEMBERS = {"__deepcopy__": _deepcopy, "__torch_function__": classmethod(_torch_function)}
_awaited = Variants(lambda cls: _MEMBERS)
