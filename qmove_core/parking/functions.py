"""What PyTorch's functions do with a tensor whose bytes are away: which need no bytes, which answer
where it lives, which must run at its home.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_Tensor: Any = torch.Tensor

# Never a wait, and no lock.
_ATTRIBUTES = (
    ("shape", "dtype", "layout", "ndim", "requires_grad", "is_leaf", "is_meta", "is_sparse")
    + ("is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes")
    + ("_backward_hooks", "grad_fn", "_version")
)
_METHODS = (
    ("size", "stride", "numel", "nelement", "element_size", "storage_offset", "is_contiguous")
    + ("__len__", "dim", "ndimension", "is_floating_point", "is_complex", "is_signed")
    + ("is_inference", "_is_view", "is_conj", "is_neg", "__hash__")
)


def _ask_for_no_bytes() -> Iterator[Any]:
    yield from (getattr(_Tensor, name).__get__ for name in _ATTRIBUTES)
    yield from (getattr(_Tensor, name) for name in _METHODS)
    yield from (torch.is_floating_point, torch.is_complex, torch.numel)


HARMLESS = frozenset(_ask_for_no_bytes())
PLACES: dict[Any, Callable[[torch.device], Any]] = {
    _Tensor.device.__get__: lambda device: device,
    _Tensor.get_device: lambda device: -1 if device.type == "cpu" else device.index,
    torch.get_device: lambda device: -1 if device.type == "cpu" else device.index,
    _Tensor.is_cpu.__get__: lambda device: device.type == "cpu",
    _Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    _Tensor.is_xpu.__get__: lambda device: device.type == "xpu",
    _Tensor.is_mps.__get__: lambda device: device.type == "mps",
    _Tensor.is_pinned: lambda _device: False,
    _Tensor.is_shared: lambda device: device.type == "cuda",
}
GRADIENT = _Tensor.grad.__get__
LIKE_IT = frozenset(  # these make a tensor where theirs lives, and read no bytes
    [getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full")]
    + [getattr(torch, f"{name}_like") for name in ("rand", "randn", "randint")]
    + [_Tensor.new_empty, _Tensor.new_empty_strided, _Tensor.new_full, _Tensor.new_ones]
    + [_Tensor.new_zeros, _Tensor.new_tensor]
)
_NOT_FOR_HOST_TENSORS = frozenset(
    [_Tensor.__dlpack__, _Tensor.__dlpack_device__, _Tensor.record_stream]
    + [_Tensor.__cuda_array_interface__.__get__]
)
MOVES = frozenset([_Tensor.to, _Tensor.cuda, _Tensor.cpu, _Tensor.xpu])
_COPIES = frozenset([_Tensor.copy_, _Tensor.data.__set__])  # from and to any device
_NO_COMPUTATION = _COPIES | LIKE_IT | MOVES | {_Tensor.detach, _Tensor.data.__get__}
ASKED_BY_TORCH = frozenset([_Tensor.dim, _Tensor.detach, _Tensor.requires_grad_, _Tensor.data_ptr])
PICKS_BY_THE_FIRST = frozenset([_Tensor.__getitem__])  # its indices may lie on the host


class OnlyAtHome(Exception):
    """A function was stopped: on the host it would give something else than at home."""


def must_be_at_home(func: Any) -> bool:
    """Whether a function needs the device whatever else it is given.

    The random numbers of the host are others.
    """
    return func in _NOT_FOR_HOST_TENSORS or _has_random_name(func)


@functools.cache
def _has_random_name(func: Any) -> bool:
    if func in LIKE_IT:
        return False
    name = getattr(func, "__name__", "")
    if getattr(func, "__module__", None) == "torch.nn.init":
        return True
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    return any(_RANDOM in getattr(packet, overload).tags for overload in packet.overloads())


_RANDOM = torch.Tag.nondeterministic_seeded


def may_draw_within(func: Any) -> bool:
    """Whether it is a function in Python, of which nobody knows what operators it calls."""
    return isinstance(func, types.FunctionType) and func.__module__ != "torch._tensor"


class NoRandomNumbers(TorchDispatchMode):
    """Raises OnlyAtHome in the place of an operator that draws random numbers."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if _RANDOM in func.tags:
            raise OnlyAtHome
        return func(*args, **(kwargs or {}))


def computes(func: Any) -> bool:
    """Whether a function does more than to move, copy or alias: autocast may take part."""
    return func not in _NO_COMPUTATION


def is_copy(func: Any) -> bool:
    """Whether a function copies from and to any device."""
    return func in _COPIES


def changes_in_place(func: Any) -> bool:
    """Whether a function writes to what it is given: it must not be tried twice."""
    name: str = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))


def told_by_place(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    place: Callable[[torch.Tensor], torch.device],
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same call, but where it is told a device by a tensor (`x.to(w)`) it is told by its name.

    Args:
        place: where a tensor lives.
    """
    kwargs = dict(kwargs)
    if func is _Tensor.type_as and len(args) > 1:
        return _Tensor.to, (args[0], place(args[1]), args[1].dtype), kwargs
    if func is _Tensor.to:
        first = 1
    elif func is torch._C._nn._parse_to:  # type: ignore[attr-defined]
        first = 0
    else:
        return func, args, kwargs
    name = "other" if first else "tensor"
    other = args[first] if len(args) > first else kwargs.pop(name, None)
    if not isinstance(other, torch.Tensor):
        return func, args, kwargs
    told = (*args[:first], place(other), other.dtype, *args[first + 1 :])
    return func, told, kwargs


def target_of(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    place: Callable[[torch.Tensor], torch.device],
) -> torch.device | None:
    """Where a move is to, with its index; None for a cast."""
    device: Any
    if func is _Tensor.cpu:
        return torch.device("cpu")
    if func is _Tensor.to:
        other = args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            return place(other)
        options = {name: value for name, value in kwargs.items() if name != "copy"}
        device = torch._C._nn._parse_to(*args[1:4], **options)[0]  # type: ignore[attr-defined]
    else:
        kind = "cuda" if func is _Tensor.cuda else "xpu"
        device = args[1] if len(args) > 1 else kwargs.get("device")
        device = torch.device(*((kind, device) if isinstance(device, int) else (device or kind,)))
    if device is None or device.index is not None or device.type in ("cpu", "meta"):
        return device  # type: ignore[no-any-return]
    return torch.device(device.type, torch.get_device_module(device).current_device())


def devices_told(leaves: Sequence[Any]) -> Iterator[torch.device]:
    """The devices that a call is told otherwise than by tensors."""
    for leaf in leaves:
        if isinstance(leaf, torch.device):
            yield leaf
        elif isinstance(leaf, (torch.Generator, torch.UntypedStorage, torch.TypedStorage)):
            yield torch.device(leaf.device)
