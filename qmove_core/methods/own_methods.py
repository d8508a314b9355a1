"""What a class's own `to()`, `cuda()` and `cpu()` note of the device: it is noted when qmove moves.

Some models keep where they are (`self.device = device`, `self.cfg.device`) in an override of their
own. When qmove has moved such a model its own method runs once, while every `to()` that it calls
further on stands still: the bytes are there, and libraries refuse to move what is quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..class_variants import Variants, own_class, set_class
from ..model.inventory import inventory

log = logging.getLogger("qmove")

_LIBRARIES = ("torch", "transformers", "diffusers", "accelerate", "peft", "bitsandbytes")
_MOVING = ("to", "cuda", "cpu", "xpu", "_apply")


def has_own(obj: object, name: str) -> bool:
    """Whether a class that is none of a library defines the method."""
    for cls in own_class(obj).__mro__:
        if name in cls.__dict__:
            return not _is_library(cls)
    return False


def let_note(
    model: Any, name: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> None:
    """Runs the own method of a model that qmove has just moved; of a pipeline its models' own.

    What it raises is logged: the model has moved.
    """
    noting = [obj for obj in (model, *_components(model)) if has_own(obj, name)]
    if not noting:
        return
    with _standing_still(model, noting):
        for obj in noting:
            try:
                getattr(obj, name)(*args, **(kwargs or {}))
            except Exception as error:
                log.warning(
                    "%s.%s raised %s (%s) when qmove had moved it: what it notes of its device may "
                    "be out of date",
                    own_class(obj).__qualname__,
                    name,
                    type(error).__name__,
                    error,
                )


def _components(model: Any) -> Iterator[nn.Module]:
    """The models of a pipeline, whose `to()` calls theirs."""
    if not isinstance(model, nn.Module):
        components = getattr(model, "components", None)
        if isinstance(components, dict):
            yield from (part for part in components.values() if isinstance(part, nn.Module))


def _is_library(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in _LIBRARIES


@contextmanager
def _standing_still(model: Any, noting: Iterable[Any]) -> Iterator[None]:
    """In the body no method of a library moves anything of the model."""
    objects = {id(obj): obj for obj in (*noting, *inventory(model).modules.values())}
    classes = [(obj, type(obj)) for obj in objects.values()]
    try:
        for obj, _cls in classes:
            _stand_still(obj)
        yield
    finally:
        for obj, cls in classes:
            set_class(obj, cls)


def _stand_still(obj: object) -> None:
    cls = own_class(obj)
    try:
        set_class(obj, _standing.of(cls) if _first_library(cls) is cls else _behind_own(cls))
    except TypeError as error:
        log.debug("%s cannot stand still (%s)", cls.__qualname__, error)


def _behind_own(cls: type) -> type:
    """A class like `cls` in which what is below its own classes stands still.

    `super().to()` in an own class comes to it.
    """
    library = _first_library(cls)
    if library is None:
        return cls
    still = _standing.of(library, announced=True)
    members = {"__slots__": (), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls, still), members)


def _first_library(cls: type) -> type | None:
    """The first class of a library among those that a class derives from, which can move."""
    return next((c for c in cls.__mro__ if _is_library(c) and hasattr(c, "to")), None)


def _members(cls: type) -> dict[str, Any]:
    return {name: lambda self, *args, **kwargs: self for name in _MOVING if hasattr(cls, name)}


_standing = Variants(_members)
