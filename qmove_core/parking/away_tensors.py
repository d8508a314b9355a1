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

An operator that records a graph for gradients, draws random numbers, or is under autocast for the
home, gives something else on the host: it runs at home (`functions.py`).

The variant's `__torch_function__` sees all of it but `torch.tensor(w)`, `x.data = w` and the like,
which read bytes that are true as well: an arriving tensor looks at its new place once they are
there. What else is past it goes through `entrances.py`. A tensor that is home has its own class and
nothing of ours on it.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_leaves

from .. import homes
from ..class_variants import Variants, base_of, own_class, set_class
from ..errors import QMoveError
from ..homes import Origin, lock, origin_of, place_of
from . import compilers, functions

_Tensor: Any = torch.Tensor
_RUN_KERNELS = ("torch._functorch", "triton", "bitsandbytes", "cupy")


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
    if func in functions.PLACES and args:
        return functions.PLACES[func](_place(args[0]))
    if func is _Tensor.share_memory_ and _place(args[0]).type == "cuda":
        return args[0]  # what is on a device is shared as it is
    at_home, makes_parameter = functions.must_be_at_home(func), False
    if func in functions.ASKED_BY_TORCH:
        caller = _caller()
        # What vmap and grad ask for before they take the tensor to where no operator is seen; and
        # the address that a kernel of the device is given.
        at_home = caller.f_globals.get("__name__", "").startswith(_RUN_KERNELS)
        is_new = caller.f_code is nn.Parameter.__new__.__code__
        makes_parameter = is_new and func is _Tensor.detach
    if func in functions.HARMLESS and not at_home:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if func is functions.GRADIENT:
        return _gradient_of(args[0])
    func, args, kwargs = functions.told_by_place(func, args, kwargs, _place)
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    with lock:
        parked = _still_parked(tensors)
        if parked:
            if not at_home and not _meet_an_accelerator(func, tensors, leaves, args, kwargs):
                try:
                    result = _on_the_host(func, parked, tensors, args, kwargs, makes_parameter)
                except functions.OnlyAtHome:
                    pass
                else:
                    if makes_parameter and caller.f_locals["cls"] is not nn.Parameter:
                        result.__dict__[_MADE_BY] = caller.f_locals["cls"]
                    return result
            _bring_home(parked)
    if torch._C._get_tracing_state() is not None:
        func = compilers.as_if_called_by(_caller(), func)
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


def bring_home(objects: Any) -> None:
    """Brings home what is away among tensors, in containers or not."""
    with lock:
        leaves = (leaf for leaf in tree_leaves(objects) if isinstance(leaf, torch.Tensor))
        parked = _still_parked(leaves)
        if parked:
            _bring_home(parked)


def meet(objects: Any) -> None:
    """The same if one of the tensors is on an accelerator."""
    tensors = [leaf for leaf in tree_leaves(objects) if isinstance(leaf, torch.Tensor)]
    if any(place_of(tensor).type not in ("cpu", "meta") for tensor in tensors):
        bring_home(tensors)


def _bring_home(tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        origin = _origin(tensor)
        if origin is not None and origin.is_result and tensor.grad_fn is not None:
            raise QMoveError(
                "An autograd.Function has computed this from a weight of a parked model, on the "
                "host, and its graph cannot go to the device. Call qmove.restore(model) before it."
            )
    origin = _origin(tensors[0])
    if origin is not None:
        origin.record.wake(list(tensors), stream=False)


def _gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    with lock, torch._C.DisableTorchFunctionSubclass():
        gradient, origin = tensor.grad, _origin(tensor)
    if gradient is not None and origin is not None and origin.is_parked:
        follow(gradient, origin)  # a backward on the host has made it
    return gradient


def _meet_an_accelerator(
    func: Any,
    tensors: Sequence[torch.Tensor],
    leaves: Sequence[Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> bool:
    if functions.is_copy(func) or func in functions.LIKE_IT:
        return False
    if func in functions.MOVES:
        target = functions.target_of(func, args, kwargs, _place)
        return target is not None and target == _place(args[0])
    if any(place_of(tensor).type not in ("cpu", "meta") for tensor in tensors):
        return True
    told = functions.devices_told(leaves)
    return any(device.type not in ("cpu", "meta") for device in told)


def _on_the_host(
    func: Any,
    parked: Sequence[torch.Tensor],
    tensors: Sequence[torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    makes_parameter: bool,
) -> Any:
    """Runs an operator on the bytes where they are.

    Raises:
        OnlyAtHome: it must run at home, and nothing has changed.
    """
    origin = _origin(parked[0])
    assert origin is not None
    if not functions.is_copy(func) and len({_place(tensor) for tensor in parked}) > 1:
        raise functions.OnlyAtHome  # PyTorch's own error, or a result at each of their homes
    if func in functions.LIKE_IT:
        if kwargs.get("device") is None:
            kwargs = kwargs | {"device": origin.home}
        return _run(func, parked, args, kwargs)
    if func is _Tensor.type and not isinstance((*args[1:], *kwargs.values(), None)[0], torch.dtype):
        raise functions.OnlyAtHome  # its name; and a name or a class stands for a device too
    if kwargs.get("non_blocking"):  # nobody would wait for it before the bytes go
        kwargs = kwargs | {"non_blocking": False}
    if functions.computes(func) and _is_autocast(origin.home, parked):
        raise functions.OnlyAtHome
    records = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if records and functions.changes_in_place(func) and func is not _Tensor.requires_grad_:
        raise functions.OnlyAtHome
    if functions.may_draw_within(func):
        with functions.NoRandomNumbers():
            result = _run(func, parked, args, kwargs)
    else:
        result = _run(func, parked, args, kwargs)
    if func in functions.MOVES:
        target = functions.target_of(func, args, kwargs, _place)
        if target is not None:
            return _sent_to_the_host(result) if target.type == "cpu" else result
    if makes_parameter and own_class(parked[0]) is nn.Parameter:
        result = _as_parameter(result)
    given = {id(tensor) for tensor in tensors}
    known = {id(tensor) for tensor in parked}
    made = [
        leaf
        for leaf in tree_leaves(result)
        if isinstance(leaf, torch.Tensor) and id(leaf) not in given
    ]
    if records and any(tensor.grad_fn is not None for tensor in made):
        raise functions.OnlyAtHome
    decide = tensors[:1] if func in functions.PICKS_BY_THE_FIRST else tensors
    is_all = all(id(tensor) in known or tensor.dim() == 0 for tensor in decide)
    for tensor in made:
        follow(tensor, origin if is_all else None)
    for tensor in tensors:  # one may look into another's storage now, as after `a.set_(b)`
        follow(tensor, None)
    _still_parked(parked)
    return result


def _is_autocast(home: torch.device, parked: Sequence[torch.Tensor]) -> bool:
    return torch.is_autocast_enabled(home.type) and any(
        tensor.is_floating_point() for tensor in parked
    )


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


def follow(tensor: torch.Tensor, made_of: Origin | None) -> None:
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
    make: Callable[..., torch.Tensor] = torch.Tensor._make_subclass  # type: ignore[attr-defined]
    return make(nn.Parameter, tensor)


def _become_parameter(tensor: torch.Tensor) -> None:
    """What a class of parameters made of a variant is a custom tensor with a mark."""
    if base_of(type(tensor)) in (torch.Tensor, nn.Parameter) and "_is_param" in tensor.__dict__:
        del tensor.__dict__["_is_param"]
        set_class(tensor, _away.of(tensor.__dict__.pop(_MADE_BY, nn.Parameter)))


_MADE_BY = "_qmove_parameter_class"


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
    follow(made, None)
    return made


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """The copy is a result: it is used as the copy of a tensor that is home, and is not parked."""
    made = _of_own_class(self, copy.deepcopy, memo)
    origin = _origin(self) if _away.made(type(self)) else None
    follow(made, origin)
    return made


def _set_class(self: Any, cls: type) -> None:
    """Whoever exchanges classes (`torch.utils.swap_tensors`) exchanges what is below them next."""
    with lock:
        parked = _still_parked([self])
        if parked:
            _bring_home(parked)
    set_class(self, cls)


def _get_class(self: Any) -> type:
    if not is_dynamo_compiling() and compilers.is_compiling_whole(sys._getframe(1)):
        bring_home(self)
    return own_class(self)


def _past_torch_function(name: str) -> Callable[..., Any]:
    """A method that PyTorch does not send through `__torch_function__`."""
    function = getattr(_Tensor, name)
    return functools.wraps(function)(
        lambda self, *args, **kwargs: _answer(function, (self, *args), kwargs)
    )


_MEMBERS = {
    "__class__": property(_get_class, _set_class),
    "__copy__": _copy,
    "__deepcopy__": _deepcopy,
    "__repr__": lambda self: _of_own_class(self, repr),
    "__format__": lambda self, spec: _of_own_class(self, format, spec),
    "set_": _past_torch_function("set_"),
    "as_subclass": _past_torch_function("as_subclass"),
    "__reduce_ex__": lambda self, protocol: _of_own_class(self, _reduce, protocol),
    "__torch_function__": classmethod(_torch_function),
}


def _reduce(tensor: Any, protocol: Any) -> Any:
    return tensor.__reduce_ex__(protocol)


_away = Variants(lambda cls: _MEMBERS)
