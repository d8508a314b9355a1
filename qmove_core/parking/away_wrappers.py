"""Wrappers of torchao whose inner tensors are away answer that they are home.

An inner tensor comes home by itself (`away_tensors.py`). The tensor around it only answers where it
lives: for anything else it has its own class meanwhile, by which its library knows it and finds it
on the host, as it is. Other libraries' wrappers say `cpu`: optimum-quanto's methods compare `type`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .. import homes
from ..class_variants import Variants, own_class, set_class
from . import functions
from .away_tensors import follow


def put_away(wrappers: Iterable[torch.Tensor], leaving: Iterable[torch.Tensor] = ()) -> None:
    """Lets wrappers whose inner tensors are away, or `leaving`, answer that they are home."""
    ids = {id(tensor) for tensor in leaving}
    for wrapper in wrappers:
        if type(wrapper).__module__.partition(".")[0] != "torchao":
            continue
        if _is_away(wrapper) or any(id(inner) in ids for inner in _inner(wrapper)):
            with contextlib.suppress(TypeError):  # its class allows no subclass: it says `cpu`
                _away.give(wrapper)


def take_home(wrappers: Iterable[torch.Tensor]) -> None:
    """Gives wrappers that are home their own class back."""
    for wrapper in wrappers:
        if _away.made(type(wrapper)) and not _is_away(wrapper):
            _away.take(wrapper)


def _is_away(wrapper: torch.Tensor) -> bool:
    origin = homes.origin_of_tensor(wrapper)
    return origin is not None and origin.is_away


def _place(wrapper: torch.Tensor) -> torch.device:
    origin = homes.origin_of_tensor(wrapper)
    if origin is not None and origin.is_away:
        return origin.home
    return _inner(wrapper)[0].device


def _inner(wrapper: Any) -> list[torch.Tensor]:
    if not hasattr(type(wrapper), "__tensor_flatten__"):
        return [wrapper]
    with torch._C.DisableTorchFunctionSubclass():
        names, _context = wrapper.__tensor_flatten__()
    return [inner for name in names for inner in _inner(getattr(wrapper, name))]


@contextlib.contextmanager
def _of_own_class(objects: Any) -> Iterator[list[torch.Tensor]]:
    away = [leaf for leaf in tree_leaves(objects) if _away.made(type(leaf))]
    _take(away)
    try:
        yield away
    finally:
        put_away(away)


def _take(wrappers: Iterable[torch.Tensor]) -> None:
    for wrapper in wrappers:
        _away.take(wrapper)


def _torch_function(
    cls: type, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    kwargs = kwargs or {}
    if func in functions.PLACES and args and _away.made(type(args[0])):
        return functions.PLACES[func](_place(args[0]))
    if func in functions.MOVES and _away.made(type(args[0])):
        return _moved(func, args, kwargs)
    with _of_own_class((args, kwargs)) as away:
        origin = homes.origin_of_tensor(away[0]) if away else None
        result = func(*args, **kwargs)
        _follow(result, away, origin)
    return result


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Home it goes itself; the host gets a copy, which stays there."""
    wrapper = args[0]
    func, args, kwargs = functions.told_by_place(func, args, kwargs, _place)
    target = functions.target_of(func, args, kwargs, _place)
    origin = homes.origin_of_tensor(wrapper)
    if origin is not None and origin.is_away and target == origin.home:
        origin.record.wake([wrapper], stream=False)
    with _of_own_class((args, kwargs)) as away:
        result = func(*args, **kwargs)
        if target is None:
            _follow(result, away, origin)
        elif target.type == "cpu":
            result = result.clone() if result is wrapper else result
            for inner in _inner(result):
                homes.settle(inner.untyped_storage())
    return result


def _torch_dispatch(
    cls: type, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
) -> Any:
    with _of_own_class((args, kwargs or {})):
        return func(*args, **(kwargs or {}))


def _follow(result: Any, away: list[torch.Tensor], origin: homes.Origin | None) -> None:
    """A wrapper that was made of one that is away lives where that does."""
    known = {id(wrapper) for wrapper in away}
    for leaf in tree_leaves(result):
        if hasattr(type(leaf), "__tensor_flatten__") and id(leaf) not in known:
            for inner in _inner(leaf):
                follow(inner, origin if origin is not None and origin.is_away else None)
            put_away([leaf])


def _with_own_class(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: Any, *args: Any) -> Any:
        with _of_own_class(self) as away:
            result = function(self, *args)
            _follow(result, away, homes.origin_of_tensor(self))
        return result

    return call


def _reduce(wrapper: Any, protocol: Any) -> Any:
    with _of_own_class(wrapper):
        return wrapper.__reduce_ex__(protocol)


def _repr(wrapper: Any) -> str:
    with _of_own_class(wrapper):
        return repr(wrapper)


_away = Variants(
    lambda cls: {
        "__class__": property(own_class, lambda self, other: set_class(self, other)),
        "__copy__": _with_own_class(copy.copy),
        "__deepcopy__": _with_own_class(copy.deepcopy),
        "__reduce_ex__": _reduce,
        "__repr__": _repr,
        "__torch_function__": classmethod(_torch_function),
        "__torch_dispatch__": classmethod(_torch_dispatch),
    }
)
