"""Attributes that are taken out of an object for a while, and put back as they were; and what
undoes a change of many steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


class Undo:
    """What undoes a change, step by step, the last one first.

    A step is noted before its change is made, and may be called twice or without need: so a change
    can be stopped at any line, and so can `undo`, which is then called again.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def note(self, step: Callable[..., object], *arguments: Any) -> None:
        """Adds a step."""
        self._steps.append((step, arguments))

    def undo(self) -> None:
        """Calls all steps, also after one that raises, and then forgets them."""
        failure = None
        for step, arguments in reversed(self._steps):
            try:
                step(*arguments)
            except BaseException as error:
                failure = error
        if failure is not None:
            raise failure
        self.forget()

    def forget(self) -> None:
        """The change is to stay."""
        self._steps.clear()


def set_aside(undo: Undo, obj: Any, names: Iterable[str] = (), **instead: Any) -> None:
    """Takes attributes out of the `__dict__` of `obj`, and sets those in `instead`.

    `undo` gives each of the names the very value again that it had (none, if it had none), at its
    old place in the order. All other attributes keep what was set meanwhile.
    """
    attributes, names = obj.__dict__, {*names, *instead}
    before = {name: attributes[name] for name in names if name in attributes}
    undo.note(_put_back, attributes, names, before, list(attributes))
    for name in before:
        attributes.pop(name, None)
    attributes.update(instead)


def _put_back(
    attributes: dict[str, Any], names: set[str], before: Mapping[str, Any], order: Sequence[str]
) -> None:
    for name in names - before.keys():
        attributes.pop(name, None)
    attributes.update(before)
    reorder(attributes, order)


def reorder(attributes: dict[str, Any], order: Sequence[str]) -> None:
    """Brings the entries of a `__dict__` into an order; those that are not in it come last."""
    others = [name for name in attributes if name not in order]
    for name in [name for name in order if name in attributes] + others:
        attributes[name] = attributes.pop(name)
