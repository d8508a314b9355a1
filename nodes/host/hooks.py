"""Wraps ComfyUI's own functions, and takes the wrappers off again."""

from __future__ import annotations

from typing import Any

_wrapped: list[tuple[Any, str, Any, Any]] = []  # owner, name, what was there, ours


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
