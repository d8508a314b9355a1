"""In which order models are used: what was seen so far says what comes next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

_REMEMBERED = 1000  # uses
_CONTEXT = 16  # uses before the current one that are compared


class UseOrder:
    """The uses of named models, and when each is expected to be used again.

    What comes next is what came next the last time, in the place whose uses before it are most like
    the latest ones.
    """

    def __init__(self, order: Iterable[str] = ()) -> None:
        self._uses: deque[str] = deque(order, maxlen=_REMEMBERED)

    def note(self, name: str) -> None:
        """A model is used now."""
        if not self._uses or self._uses[-1] != name:
            self._uses.append(name)

    def uses_until(self) -> dict[str, int]:
        """How many other uses lie before the next use of each model. One that is missing was never
        used, or not since the place that is like this one."""
        uses = list(self._uses)
        place = _likest_place(uses)
        if place is None:
            return {}
        found: dict[str, int] = {}
        for distance, name in enumerate(uses[place + 1 :]):
            found.setdefault(name, distance)
        return found

    def last_use(self, name: str) -> int:
        """The larger, the later; -1 for one that was never used."""
        return max((i for i, used in enumerate(self._uses) if used == name), default=-1)


def _likest_place(uses: list[str]) -> int | None:
    """Where the latest use was before, the newest of the places with the longest like run of uses
    up to it."""
    best, longest = None, 0
    for place in range(len(uses) - 2, -1, -1):
        length = 0
        while length < min(_CONTEXT, place + 1) and uses[place - length] == uses[-1 - length]:
            length += 1
        if length > longest:
            best, longest = place, length
    return best
