"""A parked model that is used wakes: the first forward of any of its modules brings the whole model
home.

Callers place their inputs by `model.device` before that forward, so a sleeping module must also
name its home there. Both are done by giving each module, while it is parked, a subclass of its own
class with the same name. Waking gives it its own class back, so a resident model carries no hook
and runs at full speed. Copies and pickles of a sleeping module are made as of its own class: they
are ordinary models.

A module whose tensors are under way is asleep too. It gives out none of them before it is there:
PyTorch's fast paths look at the tensors first, and some readers nobody can make wait.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.utils.weak import WeakIdKeyDictionary

from ..class_variants import Variants, base_of, own_class, reduce_as_own_class, set_class
from ..homes import is_settled, lock, parked_home, place_of
from . import compilers

log = logging.getLogger("qmove")

_wakers: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # sleeping module -> what wakes the model it belongs to
_homes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parked module -> where its tensors lived


class Waker(Protocol):
    """What a sleeping module calls before it is used."""

    @property
    def waits(self) -> bool:
        """Whether the module is asleep because its tensors are under way."""

    @property
    def gives_way(self) -> bool:
        """Whether the next one takes its place."""

    def __call__(self, module: nn.Module) -> None: ...


def put_to_sleep(modules: Iterable[nn.Module], waker: Waker) -> list[nn.Module]:
    """Makes each module call `waker` before it is used.

    A module that sleeps already keeps the waker it has.

    Returns:
        Those that were awake.
    """
    asleep = []
    try:
        for module in modules:
            before = _wakers.get(module)
            if before is None:
                asleep.append(module)
                _put_one_to_sleep(module, waker)
            elif before.gives_way:
                _wakers[module] = waker
    except BaseException:
        wake_up(asleep)
        raise
    return asleep


def _put_one_to_sleep(module: nn.Module, waker: Waker) -> None:
    try:
        _asleep.give(module)
    except TypeError as error:  # a class that allows no subclass, or no exchange
        log.log(
            logging.DEBUG if waker.gives_way else logging.WARNING,
            "%s will not wake by itself (%s); call qmove.restore",
            type(module).__qualname__,
            str(error),
        )
    else:
        _wakers[module] = waker


def wake_up(modules: Iterable[nn.Module]) -> None:
    """Gives each module its own class back. Nothing happens to modules that are awake."""
    for module in modules:
        _asleep.take(module)
        _wakers.pop(module, None)
        _homes.pop(module, None)


def note_home(module: nn.Module, device: torch.device) -> None:
    """Notes where the tensors of a module lived that falls asleep."""
    _homes[module] = device


def is_parked(module: nn.Module) -> bool:
    """Whether the module is asleep because it is parked, and not because it is under way."""
    waker = _wakers.get(module)
    return waker is not None and not waker.waits and not waker.gives_way


def _is_under_way(module: nn.Module) -> bool:
    waker = _wakers.get(module)
    return waker is not None and waker.waits


def home_of(module: nn.Module) -> torch.device | None:
    """Where the tensors of a parked module lived; None for one that had none, or is not parked."""
    return _homes.get(module)  # type: ignore[no-any-return]


def exchange_class(obj: Any, exchange: Callable[[type], type]) -> None:
    """Gives an object the class that `exchange` makes of its own one. A sleeping module sleeps on.

    Raises:
        TypeError: the class allows no subclass, or no exchange.
    """
    cls = type(obj)
    set_class(obj, _asleep.of(exchange(base_of(cls))) if _asleep.made(cls) else exchange(cls))


def sleeps_by(module: nn.Module, waker: Waker) -> bool:
    """Whether the module is asleep, and this is what wakes it."""
    return _wakers.get(module) is waker


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
            asked = waker  # a streaming restore leaves another one, for the module's own bytes
        wake_up(
            [module]
        )  # also a copy of a sleeping module, made behind our back, which nobody else would wake


_ASLEEP = "_qmove_sleeps"  # in the class of each module that sleeps


class _RousingForward:
    """`forward` of a sleeping class.

    A data descriptor, so that it comes before a `forward` that hooks put on the module.
    """

    def __init__(self, cls: type[nn.Module]) -> None:
        self._cls = cls

    def __get__(self, module: nn.Module | None, owner: type) -> Callable[..., Any]:
        if module is None:
            return self._cls.forward
        if not is_dynamo_compiling() and compilers.reads_code(sys._getframe(1)):
            _rouse(module)
            return module.forward
        own = module.__dict__
        forward = own["forward"] if "forward" in own else _forward_of_class(module)

        @functools.wraps(forward)  # transformers reads the signature before the first forward
        def rousing_forward(*args: Any, **kwargs: Any) -> Any:
            if getattr(type(module), _ASLEEP, False):
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


def _get_class(self: nn.Module) -> type:
    if not is_dynamo_compiling() and compilers.is_compiling_whole(sys._getframe(1)):
        _wake_model_of(self)
    return own_class(self)


def _members(cls: type[Any]) -> dict[str, Any]:
    """What a sleeping module does differently from others of `cls`."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(type(self), _ASLEEP, False):  # else it woke for a compiler that reads this
            _rouse(self)
        return cls.__call__(self, *args, **kwargs)

    def device(self: nn.Module) -> torch.device:
        answer = cls.device.__get__(self)
        first = next(itertools.chain(self.parameters(), self.buffers()), None)
        if first is None or answer != place_of(first):
            return answer  # type: ignore[no-any-return]
        home = parked_home(first)
        if home is None and answer.type == "cpu" and not is_settled(first.untyped_storage()):
            home = next((h for module in self.modules() if (h := home_of(module))), None)
        return answer if home is None else home  # type: ignore[no-any-return]

    def get(self: nn.Module, name: str) -> Any:
        value = cls.__getattr__(self, name)
        if isinstance(value, torch.Tensor) and _is_under_way(self):
            _rouse(self)
        return value

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> Any:
        with lock:
            sleeping = type(self)
            set_class(self, cls)  # a class that copies itself may do anything with type(self)
            try:
                return cls.__deepcopy__(self, memo)
            finally:
                set_class(self, sleeping)

    members: dict[str, Any] = {
        _ASLEEP: True,
        # What programs ask for the class, pickle among them. Who sets another one gets it, and the
        # module sleeps on.
        "__class__": property(_get_class, lambda self, other: set_class(self, _asleep.of(other))),
        "__call__": call,
        "__getattr__": get,
        "forward": _RousingForward(cls),
        "__reduce_ex__": lambda self, protocol: reduce_as_own_class(self, cls, protocol),
    }
    if isinstance(getattr(cls, "device", None), property):
        members["device"] = property(device)
    if hasattr(cls, "__deepcopy__"):
        members["__deepcopy__"] = deepcopy
    return members


_asleep = Variants(_members)
