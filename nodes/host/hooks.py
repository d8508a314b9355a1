"""Wraps ComfyUI's own functions, and takes the wrappers off again."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

_wrapped: list[tuple[Any, str, Any, Any]] = []  # owner, name, what was there, ours


def fits(
    owner: Any, name: str, positional: int, named: Sequence[str] = (), *, is_async: bool = False
) -> bool:
    """Whether a function of a class or module is there and can be called in this way.

    Another pack may have wrapped it already, in whatever way: then it only has to be callable so.
    """
    function = inspect.unwrap(getattr(owner, name, None) or len)
    if not inspect.isfunction(function):
        return False
    own_module = owner.__name__ if inspect.ismodule(owner) else owner.__module__
    is_wrapper = function.__module__ != own_module
    if not is_wrapper and inspect.iscoroutinefunction(function) is not is_async:
        return False
    signature = inspect.signature(function)
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(named))
    except TypeError:
        return False
    return True


def wrap(owner: Any, name: str, wrapper: Any) -> None:
    """Puts a wrapper in the place of a function of a class or module. Ours is put there once."""
    if not any(other is owner and known == name for other, known, _, _ in _wrapped):
        _wrapped.append((owner, name, vars(owner)[name], wrapper))
        setattr(owner, name, wrapper)


def unwrap_all() -> None:
    """Takes our wrappers off. One that another pack has wrapped since stays."""
    for owner, name, original, wrapper in reversed(_wrapped):
        if vars(owner).get(name) is wrapper:
            setattr(owner, name, original)
    _wrapped.clear()
