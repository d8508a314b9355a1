"""A parked model that is used wakes: the first forward of any of its modules brings the whole model home.

Callers place their inputs by `model.device` before that forward, so a sleeping module must also name its home there. Both
are done by giving each module, while it is parked, a subclass of its own class with the same name. Waking gives it its
own class back, so a resident model carries no hook and runs at full speed. Copies and pickles of a sleeping module are
made as of its own class: they are ordinary models.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .registry import parked_home

log = logging.getLogger("qmove")

_wakers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # sleeping module -> what wakes the model it belongs to


def put_to_sleep(modules: Iterable[nn.Module], waker: Callable[[], None]) -> None:
    """Makes each module call `waker` before it is used. A module that sleeps already keeps the waker it has."""
    asleep = []
    try:
        for module in modules:
            if module not in _wakers:
                asleep.append(module)
                _put_one_to_sleep(module, waker)
    except BaseException:
        wake_up(asleep)
        raise


def _put_one_to_sleep(module: nn.Module, waker: Callable[[], None]) -> None:
    try:
        module.__class__ = _sleeping_class(type(module))
    except TypeError as error:  # a class that allows no subclass, or no exchange: TorchScript, some metaclasses
        log.warning("%s will not wake by itself (%s); call qmove.restore", type(module).__qualname__, error)
    else:
        _wakers[module] = waker


def wake_up(modules: Iterable[nn.Module]) -> None:
    """Gives each module its own class back. Nothing happens to modules that are awake."""
    for module in modules:
        cls = type(module)
        if _is_sleeping(cls):
            module.__class__ = cls.__bases__[0]
        _wakers.pop(module, None)


def exchange_class(obj: Any, exchange: Callable[[type], type]) -> None:
    """Gives an object the class that `exchange` makes of its own one. A sleeping module sleeps on.

    Raises:
        TypeError: the class allows no subclass, or no exchange.
    """
    cls = type(obj)
    obj.__class__ = _sleeping_class(exchange(cls.__bases__[0])) if _is_sleeping(cls) else exchange(cls)


def _is_sleeping(cls: type) -> bool:
    return "_qmove_sleeping" in cls.__dict__


def _rouse(module: nn.Module) -> None:
    waker = _wakers.get(module)
    if waker is not None:
        waker()
    wake_up([module])  # also a copy of a sleeping module, made behind our back, which nobody else would wake


@functools.cache
def _sleeping_class(cls: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _rouse(self)
        return self(*args, **kwargs)

    @functools.wraps(cls.forward)  # transformers reads the signature before the first forward
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _rouse(self)
        return self.forward(*args, **kwargs)

    def device(self: nn.Module) -> torch.device:
        tensors = itertools.chain(self.parameters(), self.buffers())
        homes = (parked_home(tensor) for tensor in tensors)
        home = next((home for home in homes if home is not None), None)
        return cls.device.__get__(self) if home is None else home  # type: ignore[attr-defined]

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        function, arguments, *rest = cls.__reduce_ex__(self, protocol)
        return (function, tuple(cls if argument is sleeping else argument for argument in arguments), *rest)

    namespace: dict[str, Any] = {
        "__call__": call,
        "forward": forward,
        "__reduce_ex__": reduce_ex,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_qmove_sleeping": True,
    }
    if isinstance(getattr(cls, "device", None), property):
        namespace["device"] = property(device)
    sleeping: type[nn.Module] = type(cls)(cls.__name__, (cls,), namespace)
    return sleeping
