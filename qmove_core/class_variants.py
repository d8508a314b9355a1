"""A subclass for one object, for a while: it behaves differently and stays what it was.

Such a subclass of the object's own class is called a variant. It has the same name and docstring.
"""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_MARK = "_qmove_variant"  # in the namespace of each variant: the Variants that made it


class Variants:
    """The variants for one purpose: one for each class, made when it is first needed."""

    def __init__(self, members: Callable[[type], dict[str, Any]]) -> None:
        """`members` returns the namespace of the variant of a class."""
        self._members = members
        # Weak: some classes are made for one module (GraphModule, parametrizations) and go with it.
        self._made: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()

    def of(self, cls: type, *, announced: bool = False) -> type:
        """The variant of `cls`.

        Args:
            announced: the classes that `cls` derives from learn of the new subclass
                (`__init_subclass__`). Otherwise they do not, since libraries register or change
                their subclasses.

        Raises:
            TypeError: the class allows no subclass.
        """
        variant = self._made.get(cls)
        if variant is None or (announced and len(variant.__bases__) > 1):
            first = None if announced else _unannounced(cls)
            # Past what a metaclass does with new classes; isinstance needs ABCMeta's part.
            maker = abc.ABCMeta if issubclass(type(cls), abc.ABCMeta) else type
            self._made[cls] = variant = maker.__new__(
                type(cls),
                cls.__name__,
                (cls,) if first is None else (first, cls),
                {
                    "__slots__": (),
                    "__module__": cls.__module__,
                    "__qualname__": cls.__qualname__,
                    "__doc__": cls.__doc__,
                    _MARK: self,
                    **self._members(cls),
                },
            )
        return variant

    def made(self, cls: type) -> bool:
        """Whether `cls` is a variant of this purpose."""
        return cls.__dict__.get(_MARK) is self

    def give(self, obj: object) -> None:
        """Gives `obj` the variant of its class. Does nothing if it has one of this purpose.

        Raises:
            TypeError: its class allows no subclass, or no exchange.
        """
        cls = type(obj)
        if self.made(cls):
            return
        try:
            set_class(obj, self.of(cls))
        except TypeError:
            # The memory layout differs behind another first base (a module behind an ABC mixin).
            set_class(obj, self.of(cls, announced=True))

    def take(self, obj: object) -> None:
        """Gives `obj` the class back that it had before `give`; nothing happens without `give`."""
        if self.made(type(obj)):
            set_class(obj, base_of(type(obj)))


def base_of(variant: type) -> type:
    """The class that a variant was made from."""
    return variant.__bases__[-1]


def own_class(obj: object) -> type:
    """The class of an object without variants."""
    return next(cls for cls in type(obj).__mro__ if _MARK not in cls.__dict__)


def reduce_as_own_class(obj: Any, cls: type[Any], protocol: Any) -> Any:
    """`cls.__reduce_ex__` of `obj`, so that copies and pickles are of its own class, no variant."""
    reduced: Any = cls.__reduce_ex__(obj, protocol)  # type: ignore[call-arg]
    function, arguments, *rest = reduced
    own = own_class(obj)
    return function, tuple(own if item is type(obj) else item for item in arguments), *rest


def set_class(obj: object, cls: type) -> None:
    """`obj.__class__ = cls`, past what its class does when an attribute is set.

    Raises:
        TypeError: the two classes have different memory layouts.
    """
    object.__dict__["__class__"].__set__(obj, cls)


class _UnannouncedModule(nn.Module):
    """The first base of a module's variant, so that the own class does not learn of it."""

    _qmove_variant = None

    def __init_subclass__(cls) -> None:
        pass


class _UnannouncedTensor:
    """The same for tensors: the memory layout must be that of the class which follows."""

    _qmove_variant = None

    def __init_subclass__(cls) -> None:
        pass


def _unannounced(cls: type) -> type | None:
    """What comes before `cls` among the bases of its variant; None where nothing can or need."""
    pairs = ((nn.Module, _UnannouncedModule), (torch.Tensor, _UnannouncedTensor))
    for base, first in pairs:
        if issubclass(cls, base):
            return None if issubclass(cls, first) else first
    return None
