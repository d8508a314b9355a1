"""Attributes that are taken out of an object for a while, and put back as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def set_aside(obj: Any, names: Iterable[str] = (), **instead: Any) -> Callable[[], None]:
    """Takes attributes out of the `__dict__` of `obj`, and sets those in `instead`.

    Returns what undoes it: each of the names has the very value again that it had (none, if it had
    none), at its old place in the order. All other attributes keep what was set meanwhile.
    """
    attributes, names, order = obj.__dict__, {*names, *instead}, list(obj.__dict__)
    before = {name: attributes.pop(name) for name in names if name in attributes}
    attributes.update(instead)

    def put_back() -> None:
        for name in names - before.keys():
            attributes.pop(name, None)
        attributes.update(before)
        reorder(attributes, order)

    return put_back


def reorder(attributes: dict[str, Any], order: Sequence[str]) -> None:
    """Brings the entries of a `__dict__` into an order; those that are not in it come last."""
    others = [name for name in attributes if name not in order]
    for name in [name for name in order if name in attributes] + others:
        attributes[name] = attributes.pop(name)
