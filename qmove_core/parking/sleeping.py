"""A parked model that is used wakes: the first forward of any of its modules brings the whole model home.

Callers place their inputs by `model.device` before that forward, so a sleeping module must also name its home there. Both
are done by giving each module, while it is parked, a subclass of its own class with the same name. Waking gives it its
own class back, so a resident model carries no hook and runs at full speed. Copies and pickles of a sleeping module are
made as of its own class: they are ordinary models.
"""

from __future__ import annotations

import abc
import functools
import itertools
import logging
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..homes import lock, parked_home

log = logging.getLogger("qmove")

_wakers: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # sleeping module -> what wakes the model it belongs to


def put_to_sleep(modules: Iterable[nn.Module], waker: Callable[[nn.Module], None]) -> None:
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


def _put_one_to_sleep(module: nn.Module, waker: Callable[[nn.Module], None]) -> None:
    cls = type(module)
    try:
        try:
            _give_class(module, _sleeping_class(cls))
        except TypeError:  # its memory is not laid out as that of a class with another first base (one behind an ABC mixin)
            _give_class(module, _sleeping_class(cls, announced=True))
    except TypeError as error:  # a class that allows no subclass, or no exchange
        log.warning(
            "%s will not wake by itself (%s); call qmove.restore", cls.__qualname__, str(error)
        )
    else:
        _wakers[module] = waker


def wake_up(modules: Iterable[nn.Module]) -> None:
    """Gives each module its own class back. Nothing happens to modules that are awake."""
    for module in modules:
        cls = type(module)
        if _is_sleeping(cls):
            _give_class(module, cls.__bases__[-1])
        _wakers.pop(module, None)


def own_class(obj: object) -> type:
    """The class of an object without what qmove has put before it (here, and in `methods.to_method`)."""
    return next(
        cls
        for cls in type(obj).__mro__
        if not {"_qmove_sleeping", "_qmove_enabled"} & cls.__dict__.keys()
    )


def exchange_class(obj: Any, exchange: Callable[[type], type]) -> None:
    """Gives an object the class that `exchange` makes of its own one. A sleeping module sleeps on.

    Raises:
        TypeError: the class allows no subclass, or no exchange.
    """
    cls = type(obj)
    _give_class(
        obj, _sleeping_class(exchange(cls.__bases__[-1])) if _is_sleeping(cls) else exchange(cls)
    )


def sleeps_by(module: nn.Module, waker: Callable[[nn.Module], None]) -> bool:
    """Whether the module is asleep, and this is what wakes it."""
    return _wakers.get(module) is waker


def _is_sleeping(cls: type) -> bool:
    return "_qmove_sleeping" in cls.__dict__


def _give_class(obj: object, cls: type) -> None:
    object.__dict__["__class__"].__set__(
        obj, cls
    )  # whatever the object's class makes of setting an attribute


def _rouse(module: nn.Module) -> None:
    if (
        "torch._dynamo" in sys.modules
    ):  # without it nothing is being compiled, and importing it takes seconds
        torch.compiler.disable(_wake_model_of)(module)
    else:
        _wake_model_of(module)


def _wake_model_of(module: nn.Module) -> None:
    with lock:
        asked = None
        while (waker := _wakers.get(module)) is not None and waker is not asked:
            waker(module)
            asked = waker  # a streaming restore leaves another one, that waits for the module's own bytes
        wake_up(
            [module]
        )  # also a copy of a sleeping module, made behind our back, which nobody else would wake


class _Unannounced(nn.Module):
    """Comes first among the bases of a sleeping class: libraries that register or change their subclasses must not see it."""

    _qmove_sleeping = True

    def __init_subclass__(cls) -> None:
        pass


class _RousingForward:
    """`forward` of a sleeping class. A data descriptor, so that it comes before a `forward` that hooks put on the module."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self._cls = cls

    def __get__(self, module: nn.Module | None, owner: type) -> Callable[..., Any]:
        if module is None:
            return self._cls.forward
        forward = module.__dict__.get("forward") or _forward_of_class(module)

        @functools.wraps(forward)  # transformers reads the signature before the first forward
        def rousing_forward(*args: Any, **kwargs: Any) -> Any:
            _rouse(module)
            return forward(*args, **kwargs)

        return rousing_forward

    def __set__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.__dict__["forward"] = forward

    def __delete__(self, module: nn.Module) -> None:
        del module.__dict__["forward"]


def _forward_of_class(module: nn.Module) -> Callable[..., Any]:
    try:
        return super(type(module), module).forward  # type: ignore[misc]
    except AttributeError:  # TorchScript keeps it in C++
        return module.__getattr__("forward")  # type: ignore[return-value]


def _sleeping_class(cls: type[nn.Module], *, announced: bool = False) -> type[nn.Module]:
    sleeping = _sleeping_classes.get(cls)
    if sleeping is None or (announced and _Unannounced in sleeping.__bases__):
        _sleeping_classes[cls] = sleeping = _make_sleeping_class(cls, announced)
    return sleeping


# Weak, since some classes are made for one module only (GraphModule, parametrizations) and must be able to go with it.
_sleeping_classes: weakref.WeakValueDictionary[type[nn.Module], type[nn.Module]] = (
    weakref.WeakValueDictionary()
)


def _make_sleeping_class(cls: type[nn.Module], announced: bool) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _rouse(self)
        return cls.__call__(self, *args, **kwargs)

    def device(self: nn.Module) -> torch.device:
        answer = cls.device.__get__(self)  # type: ignore[attr-defined]
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        home = parked_home(first) if first is not None and answer == first.device else None
        return answer if home is None else home

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        function, arguments, *rest = cls.__reduce_ex__(self, protocol)  # type: ignore[str-unpack]
        return (
            function,
            tuple(own_class(self) if argument is sleeping else argument for argument in arguments),
            *rest,
        )

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
        with lock:
            _give_class(self, cls)  # a class that copies itself may do anything with type(self)
            try:
                return cls.__deepcopy__(self, memo)  # type: ignore[attr-defined]
            finally:
                _give_class(self, sleeping)

    namespace: dict[str, Any] = {
        "__slots__": (),
        # What programs ask for the class, pickle among them. Whoever sets another one gets it, and the module sleeps on.
        "__class__": property(
            own_class, lambda self, other: _give_class(self, _sleeping_class(other))
        ),
        "__call__": call,
        "forward": _RousingForward(cls),
        "__reduce_ex__": reduce_ex,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_qmove_sleeping": True,
    }
    if isinstance(getattr(cls, "device", None), property):
        namespace["device"] = property(device)
    if hasattr(cls, "__deepcopy__"):
        namespace["__deepcopy__"] = deepcopy
    # Past what a metaclass of the model's author does with new classes; ABCMeta's part is needed for isinstance to work.
    maker = abc.ABCMeta if issubclass(type(cls), abc.ABCMeta) else type
    bases = (cls,) if announced else (_Unannounced, cls)
    sleeping = maker.__new__(type(cls), cls.__name__, bases, namespace)
    return sleeping
