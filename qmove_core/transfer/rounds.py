"""Which storages of a swap are copied next. Only bytes are counted here, so that a swap can be
tried to its end before the first byte moves.

In each round some storages leave the device and some come to it. What leaves needs host memory: its
own, or a gap in the blocks that the swap may write to. What comes needs room on its device. A
storage that has left is room for one that comes, and the place of one that came is a gap.

    host free + device free = the same before each round

So a swap can go on as long as both together have room for the largest storage of each model, and
some gap is large enough for what leaves. Gaps too small for anything are closed: what lies in the
block moves to its start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROUND = 32 << 20  # bytes of each direction in one round


@dataclass(frozen=True, slots=True)
class Place:
    """Host memory: bytes [start, end) of a block."""

    block: Any
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Item:
    """One storage that leaves or comes.

    Attributes:
        nbytes: on the device.
        device: which it leaves or comes to.
        place: of one that comes: the host memory that is free when it came; None for none.
        wanted: of one that leaves: bytes of host memory that it needs; 0 if it has some.
        is_copied: whether it takes part of the link.
    """

    nbytes: int
    device: Any
    place: Place | None = None
    wanted: int = 0
    is_copied: bool = True


@dataclass(slots=True)
class Round:
    """What is copied at once: `out` with the host memory that was chosen, and `into`.

    Both are numbers in the sequences that `Rounds` was made of.
    """

    out: list[tuple[int, Place | None]] = field(default_factory=list)
    into: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Slide:
    """A storage that moves within its block: number `number` of the coming ones, or of those that
    have left."""

    is_coming: bool
    number: int
    start: int
    to: Place


class Rounds:
    """The state of a swap between two rounds.

    Args:
        leaving, coming: in the order in which they go.
        room: bytes that may be allocated on each device.
        gaps: host memory that is free.
    """

    def __init__(
        self,
        leaving: Sequence[Item],
        coming: Sequence[Item],
        room: Mapping[Any, int],
        gaps: Sequence[Place] = (),
    ) -> None:
        self._leaving, self._coming = leaving, coming
        self._left = self._came = 0  # how many of each went
        self._room, self._gaps = dict(room), list(gaps)
        # Where storages lie that may be moved within their block: (is_coming, number) -> place.
        self._places = {
            (True, number): item.place for number, item in enumerate(coming) if item.place
        }

    @property
    def is_done(self) -> bool:
        return self._left == len(self._leaving) and self._came == len(self._coming)

    @property
    def lacking(self) -> int:
        """Bytes of host memory that would be enough for all that has not left."""
        return sum(item.wanted for item in self._leaving[self._left :])

    def can_finish(self, more: Sequence[Place] = ()) -> bool:
        """Whether all goes if every storage gives up its place; with these gaps more."""
        trial = Rounds(self._leaving, self._coming, self._room, [*self._gaps, *more])
        trial._left, trial._came, trial._places = self._left, self._came, dict(self._places)
        while not trial.is_done:
            now = trial.next()
            if not now.out and not now.into and not trial.close_gaps():
                return False
            for number, _place in now.out:
                trial.has_left(number)
            for number in now.into:
                trial.has_come(number)
        return True

    def next(self) -> Round:
        """Chooses what is copied next and takes the memory for it. Nothing: it cannot go on."""
        found, nbytes = Round(), 0
        while self._left < len(self._leaving) and nbytes < ROUND:
            item = self._leaving[self._left]
            place = self._take(item.wanted) if item.wanted else None
            if item.wanted and place is None:
                break
            if place is not None:
                self._places[False, self._left] = place
            found.out.append((self._left, place))
            nbytes += item.nbytes if item.is_copied else 0
            self._left += 1
        nbytes = 0
        all_left = self._left == len(self._leaving)
        while self._came < len(self._coming) and (nbytes < ROUND or all_left):
            item = self._coming[self._came]
            has_room = self._room[item.device] >= item.nbytes
            # Where nothing is left to leave, the allocation itself decides.
            if not has_room and (found.out or found.into or not all_left):
                break
            self._room[item.device] -= item.nbytes
            found.into.append(self._came)
            nbytes += item.nbytes
            self._came += 1
        return found

    def has_left(self, number: int) -> None:
        """The storage has given up its place on the device."""
        item = self._leaving[number]
        self._room[item.device] = self._room.get(item.device, 0) + item.nbytes

    def has_come(self, number: int) -> None:
        """Nobody uses the storage's place on the host any more."""
        place = self._places.pop((True, number), None)
        if place is not None:
            self.add(place)

    def stays(self, number: int) -> None:
        """Somebody uses the place on the host of a storage that has come."""
        self._places.pop((True, number), None)

    def add(self, place: Place) -> None:
        """Host memory has become free. Beside another gap the two are one."""
        start, end = place.start, place.end
        for gap in [gap for gap in self._gaps if gap.block == place.block]:
            if gap.end == start or gap.start == end:
                start, end = min(start, gap.start), max(end, gap.end)
                self._gaps.remove(gap)
        self._gaps.append(Place(place.block, start, end))

    def close_gaps(self) -> list[Slide]:
        """Moves storages towards the start of their blocks, so that gaps become one. Nothing: there
        is none to close."""
        slides = []
        in_order = sorted(self._places.items(), key=lambda entry: entry[1].start)
        for (is_coming, number), place in in_order:
            gap = next(
                (g for g in self._gaps if (g.block, g.end) == (place.block, place.start)), None
            )
            if gap is not None:
                self._gaps.remove(gap)
                to = Place(place.block, gap.start, gap.start + place.nbytes)
                self._places[is_coming, number] = to
                self.add(Place(place.block, to.end, place.end))
                slides.append(Slide(is_coming, number, place.start, to))
        return slides

    def _take(self, nbytes: int) -> Place | None:
        """The start of the smallest gap that is large enough."""
        fitting = [gap for gap in self._gaps if gap.nbytes >= nbytes]
        if not fitting:
            return None
        gap = min(fitting, key=lambda gap: gap.nbytes)
        self._gaps.remove(gap)
        if gap.nbytes > nbytes:
            self._gaps.append(Place(gap.block, gap.start + nbytes, gap.end))
        return Place(gap.block, gap.start, gap.start + nbytes)
