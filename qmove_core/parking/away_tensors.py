"""Tensors whose bytes are away from home: whoever uses one where they are needed brings them home.

A tensor is in one of four states, and the storage it looks into knows which (`homes.Origin`):

| state    | class   | bytes               | asked where it lives | meets an accelerator | alone |
|----------|---------|---------------------|----------------------|----------------------|-------|
| home     | its own | device              | there                |                      |       |
| parked   | variant | arena               | home                 | comes home           | host  |
| result   | variant | host, not the arena | home                 | comes home           | host  |
| arriving | variant | arena, being copied | where it comes to    | waits, is home       | waits |

"Meets an accelerator": an operator has it and a tensor on an accelerator for arguments, or is told
such a device. "Alone": an operator has only it and tensors of the host. What comes of that looks
into the same storage and is parked too, or is a new tensor, a *result*, that would have been made
at home. Mixed with an ordinary host tensor it gives an ordinary host tensor.

The variant's `__torch_function__` sees all of it but `torch.tensor(w)`, `x.data = w` and the like,
which read bytes that are true as well: an arriving tensor looks at its new place once they are
there. A tensor that is home has its own class and nothing of ours on it.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .. import homes
from ..class_variants import Variants, base_of, own_class, set_class
from ..homes import Origin, lock, origin_of, place_of

_Tensor: Any = torch.Tensor

# Never a wait, and no lock.
_ATTRIBUTES = (
    ("shape", "dtype", "layout", "ndim", "requires_grad", "is_leaf", "is_meta", "is_sparse")
    + ("is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes", "grad")
    + ("_backward_hooks", "grad_fn", "_version")
)
_METHODS = (
    ("size", "stride", "numel", "nelement", "element_size", "storage_offset", "is_contiguous")
    + ("__len__", "dim", "ndimension", "is_floating_point", "is_complex", "is_signed")
    + ("is_inference", "_is_view", "is_conj", "is_neg", "__hash__")
)


def _asks_for_no_bytes() -> Iterator[Any]:
    yield from (getattr(_Tensor, name).__get__ for name in _ATTRIBUTES)
    yield from (getattr(_Tensor, name) for name in _METHODS)
    yield from (torch.is_floating_point, torch.is_complex, torch.numel)


_HARMLESS = frozenset(_asks_for_no_bytes())
_PLACES: dict[Any, Callable[[torch.device], Any]] = {
    _Tensor.device.__get__: lambda device: device,
    _Tensor.get_device: lambda device: -1 if device.type == "cpu" else device.index,
    torch.get_device: lambda device: -1 if device.type == "cpu" else device.index,
    _Tensor.is_cpu.__get__: lambda device: device.type == "cpu",
    _Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    _Tensor.is_xpu.__get__: lambda device: device.type == "xpu",
    _Tensor.is_mps.__get__: lambda device: device.type == "mps",
}
_LIKE_IT = frozenset(  # these make a tensor where theirs lives, and read no bytes
    [getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full")]
    + [getattr(torch, f"{name}_like") for name in ("rand", "randn", "randint")]
    + [_Tensor.new_empty, _Tensor.new_empty_strided, _Tensor.new_full, _Tensor.new_ones]
    + [_Tensor.new_zeros, _Tensor.new_tensor, _Tensor.new]
)
_ONLY_AT_HOME = frozenset(  # the host's random numbers are others; the rest is not for host tensors
    [getattr(_Tensor, f"{name}_") for name in ("normal", "uniform", "random", "bernoulli")]
    + [getattr(_Tensor, f"{name}_") for name in ("exponential", "geometric", "log_normal")]
    + [_Tensor.cauchy_, _Tensor.bernoulli, _Tensor.multinomial, torch.bernoulli]
    + [torch.multinomial, torch.poisson, torch.normal, torch.dropout, torch.nn.functional.dropout]
    + [_Tensor.__dlpack__, _Tensor.__dlpack_device__, _Tensor.record_stream]
    + [_Tensor.__cuda_array_interface__.__get__]
)
_MOVES = frozenset([_Tensor.to, _Tensor.cuda, _Tensor.cpu, _Tensor.xpu])
_COPIES = frozenset([_Tensor.copy_, _Tensor.data.__set__])  # from and to any device
_ASKED_BY_TORCH = frozenset([_Tensor.dim, _Tensor.detach, _Tensor.requires_grad_])


def put_away(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Gives tensors the class that looks after them. Where one allows no subclass it stays.

    Returns:
        Those that did not have it.
    """
    given = []
    for tensor in tensors:
        if not _away.made(type(tensor)):
            try:
                _away.give(tensor)
            except TypeError:  # its module, which wakes, or its owner brings it home
                continue
            given.append(tensor)
    return given


def take_home(tensors: Iterable[torch.Tensor]) -> None:
    """Gives tensors that are home their own class back."""
    for tensor in tensors:
        if _away.made(type(tensor)) and _origin(tensor) is None:
            _become_parameter(tensor)
            _away.take(tensor)


def allows_looking_after(cls: type) -> bool:
    """Whether tensors of a class can be given another for a while."""
    try:
        return _away.made(cls) or _away.of(cls) is not None
    except TypeError:
        return False


def is_looked_after(tensor: torch.Tensor) -> bool:
    """Whether a tensor that is away comes home by itself."""
    return _away.made(type(tensor))


def arrive(tensor: torch.Tensor) -> None:
    """Waits for a tensor that is under way. It is home then."""
    if _away.made(type(tensor)):
        with lock:
            origin = _origin(tensor)
            if origin is not None and origin.arrival is not None:
                origin.arrival()


def _origin(tensor: torch.Tensor) -> Origin | None:
    """The origin of a tensor that is away; None for one that is home."""
    with torch._C.DisableTorchFunctionSubclass():
        origin = origin_of(tensor.untyped_storage())
    return origin if origin is not None and origin.is_away else None


def _place(tensor: torch.Tensor) -> torch.device:
    """Where a tensor lives, for its user."""
    if _away.made(type(tensor)):
        origin = _origin(tensor)
        if origin is None:  # between two places, if another thread moves it
            with lock:
                origin = _origin(tensor)
        if origin is not None:
            return origin.home
    return place_of(tensor)


def _torch_function(
    cls: type,
    func: Callable[..., Any],
    _types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    if "torch._dynamo" in sys.modules:  # importing it takes seconds; it would compile what follows
        return _uncompiled()(func, args, kwargs or {})
    return _answer(func, args, kwargs or {})


@functools.cache
def _uncompiled() -> Callable[..., Any]:
    return torch.compiler.disable(_answer)  # type: ignore[no-any-return]


def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _PLACES and args:
        return _PLACES[func](_place(args[0]))
    at_home, makes_parameter = func in _ONLY_AT_HOME, False
    if func in _ASKED_BY_TORCH:
        caller = _caller()
        # What vmap and grad ask for before they take the tensor to where no operator is seen.
        at_home = caller.f_globals.get("__name__", "").startswith("torch._functorch")
        is_new = caller.f_code is nn.Parameter.__new__.__code__
        makes_parameter = is_new and func is _Tensor.detach
    if func in _HARMLESS and not at_home:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    with lock:
        parked = _still_parked(tensors)
        if parked:
            if not at_home and not _meet_an_accelerator(func, tensors, args, kwargs):
                return _on_the_host(func, parked, tensors, args, kwargs, makes_parameter)
            _bring_home(parked)
    result = func(*args, **kwargs)
    if makes_parameter and type(args[0]) is nn.Parameter:  # `detach`: a custom tensor's keeps class
        return _as_parameter(result)
    return result


def _caller() -> types.FrameType:
    """The frame that called the operator."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__") in _BETWEEN:
        frame = frame.f_back
    return frame


_BETWEEN = (__name__, "torch._dynamo.eval_frame")


def _still_parked(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Those that are parked. Those under way are waited for."""
    parked = []
    for tensor in tensors:
        if _away.made(type(tensor)):
            arrive(tensor)
            take_home([tensor])  # if it has arrived, or its owner has given it other data
            if _away.made(type(tensor)):
                _become_parameter(tensor)
                parked.append(tensor)
    return parked


def _bring_home(tensors: Sequence[torch.Tensor]) -> None:
    origin = _origin(tensors[0])
    if origin is not None:
        origin.record.wake(list(tensors), stream=False)


def _meet_an_accelerator(
    func: Any, tensors: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    if func in _COPIES or func in _LIKE_IT:
        return False
    if getattr(func, "__module__", None) == "torch.nn.init":
        return True
    if func in _MOVES:
        target = _target_of(func, args, kwargs)
        return target is not None and target == _place(args[0])
    if any(place_of(tensor).type not in ("cpu", "meta") for tensor in tensors):
        return True
    devices = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.device)]
    return any(device.type not in ("cpu", "meta") for device in devices)


def _target_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where a move is to, with its index; None for a cast."""
    device: Any
    if func is _Tensor.cpu:
        return torch.device("cpu")
    if func is _Tensor.to:
        other = args[1] if len(args) > 1 else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            return _place(other)
        options = {name: value for name, value in kwargs.items() if name != "copy"}
        device = torch._C._nn._parse_to(*args[1:4], **options)[0]  # type: ignore[attr-defined]
    else:
        kind = "cuda" if func is _Tensor.cuda else "xpu"
        device = args[1] if len(args) > 1 else kwargs.get("device")
        device = torch.device(*((kind, device) if isinstance(device, int) else (device or kind,)))
    if device is None or device.index is not None or device.type in ("cpu", "meta"):
        return device  # type: ignore[no-any-return]
    return torch.device(device.type, torch.get_device_module(device).current_device())


def _on_the_host(
    func: Any,
    parked: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    makes_parameter: bool,
) -> Any:
    """Runs an operator on the bytes where they are."""
    origin = _origin(parked[0])
    assert origin is not None
    if func in _LIKE_IT:
        if kwargs.get("device") is None:
            kwargs = kwargs | {"device": origin.home}
        return _run(func, parked, args, kwargs)
    if kwargs.get("non_blocking"):  # nobody would wait for it before the bytes go
        kwargs = kwargs | {"non_blocking": False}
    result = _run(func, parked, args, kwargs)
    if func in _MOVES and (target := _target_of(func, args, kwargs)) is not None:
        return _sent_to_the_host(result) if target.type == "cpu" else result
    if makes_parameter and own_class(parked[0]) is nn.Parameter:
        result = _as_parameter(result)
    given = {id(tensor) for tensor in tensors}
    known = {id(tensor) for tensor in parked}
    is_all = all(id(tensor) in known or tensor.dim() == 0 for tensor in tensors)
    for made in tree_leaves(result):
        if isinstance(made, torch.Tensor) and id(made) not in given:
            _follow(made, origin if is_all else None)
    for tensor in tensors:  # one may look into another's storage now, as after `a.set_(b)`
        _follow(tensor, None)
    _still_parked(parked)
    return result


def _run(
    func: Any, parked: Sequence[torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    own: list[Any] = [own_class(tensor) for tensor in parked]
    for cls in own:
        function = cls.__torch_function__
        if cls is not torch.Tensor and function is not torch._C._disabled_torch_function_impl:
            return function(func, tuple(dict.fromkeys(own)), args, kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _follow(tensor: torch.Tensor, made_of: Origin | None) -> None:
    """What looks into a parked storage is parked too. Other tensors are where `made_of` is home."""
    if not _has_bytes_on_the_host(tensor):
        return
    with torch._C.DisableTorchFunctionSubclass():
        storage = tensor.untyped_storage()
    origin = origin_of(storage)
    if origin is None or not origin.is_away:
        if made_of is None:
            return
        origin = Origin(made_of.home, storage.nbytes(), made_of.record, is_result=True)
        homes.remember_result(storage, origin)
    if put_away([tensor]) or all(ref() is not tensor for ref in origin.tensors):
        origin.add(tensor)


def _has_bytes_on_the_host(tensor: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        is_plain = tensor.layout is torch.strided and not hasattr(tensor, "__tensor_flatten__")
        return is_plain and tensor.device.type == "cpu"


def _sent_to_the_host(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary host tensor, which stays one when its model comes home."""
    with torch._C.DisableTorchFunctionSubclass():
        storage = tensor.untyped_storage()
        origin = origin_of(storage)
        if origin is not None and origin.is_away:
            tensor = tensor.clone()
            storage = tensor.untyped_storage()
    homes.settle(storage)
    return tensor


def _as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.Tensor._make_subclass(nn.Parameter, tensor)  # type: ignore[attr-defined, no-any-return]


def _become_parameter(tensor: torch.Tensor) -> None:
    """What `Parameter` made of a variant of a plain tensor is a custom tensor with a mark."""
    if base_of(type(tensor)) is torch.Tensor and tensor.__dict__.pop("_is_param", False):
        set_class(tensor, _away.of(nn.Parameter))


def _of_own_class(tensor: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function on a tensor that has its own class meanwhile: what is made of it is
    ordinary, whatever the class does with `type(self)`."""
    with lock:
        _still_parked([tensor])
        variant = type(tensor)
        if not _away.made(variant):
            return function(tensor, *args)
        set_class(tensor, base_of(variant))
        try:
            return function(tensor, *args)
        finally:
            set_class(tensor, variant)


def _copy(self: Any) -> Any:
    made = _of_own_class(self, copy.copy)
    _follow(made, None)
    return made


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """The copy is a result: it is used as the copy of a tensor that is home, and is not parked."""
    made = _of_own_class(self, copy.deepcopy, memo)
    origin = _origin(self) if _away.made(type(self)) else None
    _follow(made, origin)
    return made


def _set_class(self: Any, cls: type) -> None:
    """Whoever exchanges classes (`torch.utils.swap_tensors`) exchanges what is below them next."""
    with lock:
        parked = _still_parked([self])
        if parked:
            _bring_home(parked)
    set_class(self, cls)


_MEMBERS = {
    "__class__": property(own_class, _set_class),
    "__copy__": _copy,
    "__deepcopy__": _deepcopy,
    "__repr__": lambda self: _of_own_class(self, repr),
    "__reduce_ex__": lambda self, protocol: _of_own_class(self, _reduce, protocol),
    "__torch_function__": classmethod(_torch_function),
}


def _reduce(tensor: Any, protocol: Any) -> Any:
    return tensor.__reduce_ex__(protocol)


_away = Variants(lambda cls: _MEMBERS)
