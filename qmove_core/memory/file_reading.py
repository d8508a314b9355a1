"""Reads what is restored from mapped files, at the speed of the disk, and proves it.

What will be read is known before the first byte moves. So while one stretch of it is used, threads
read the next ones into slots of a ring and take their sums: the disk, the processor and the link
work at the same time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import devices, workers
from ..digests.checksum import Checksum, Sums, sums_of
from .blocks import ALIGNMENT, HostBlock
from .mapped_files import MappedFile, Part
from .pages import PAGE
from .ring import SLOTS, Ring, Slot

_AHEAD = SLOTS - 1  # slots that are read to or used; one is for what else crosses the link

Place = tuple[HostBlock, int]  # what a storage lies in, and where it begins there


@dataclass(eq=False, slots=True)
class _Stretch:
    """Bytes of one file that are read at once.

    Attributes:
        start, end: where they are in the file.
        parts: what it has of each part, as [start, end) in the file.
    """

    file: MappedFile
    start: int
    end: int
    parts: list[tuple[Part, int, int]] = field(default_factory=list)


class _Read:
    """A stretch that is being read to a slot.

    Attributes:
        content: its bytes, flat uint8.
        sums: of each of its parts.
        error: what was raised instead.
        is_looked_at: whether somebody has asked for the bytes.
    """

    def __init__(self, stretch: _Stretch, slot: Slot) -> None:
        self.stretch, self.slot = stretch, slot
        self.content = slot.memory[:0]
        self.sums: list[Sums] = []
        self.error: Exception | None = None
        self.is_looked_at = False
        self.future: Future[None] | None = workers.submit_read(self._read)
        if self.future is None:
            self._read()

    def _read(self) -> None:
        stretch = self.stretch
        try:
            room = self.slot.memory.numpy()
            with torch.inference_mode(False):
                self.content = torch.from_numpy(
                    stretch.file.read_into(room, stretch.start, stretch.end)
                )
            for part, start, end in stretch.parts:
                content = self.content[start - stretch.start : end - stretch.start]
                self.sums.append(sums_of(content, start - part.start))
        except Exception as error:
            self.error = error.with_traceback(None)  # whoever keeps it keeps no slot


class ReadAhead:
    """Reads storages that lie in mapped files, in order, through slots of a ring.

    Use it in a `with`: at its end nothing is being read any more.

    Args:
        ring: of which no slot is lent.
        wanted: where each storage lies. What lies in no file is left out.
        locked: whether the ring is to be page-locked, if it is not there yet.
    """

    def __init__(self, ring: Ring, wanted: Iterable[Place | None], *, locked: bool = True) -> None:
        self._ring = ring
        self._checksums: dict[int, Checksum] = {}  # of parts that came in part, by their ids
        self._reading: deque[_Read] = deque()
        places = [
            (place[0], place[0].part_at(place[1]))
            for place in wanted
            if place is not None and isinstance(place[0], MappedFile)
        ]
        slot = ring.open(locked=locked) if places else 0
        self._to_read = deque(_stretches(places, slot))

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(self, *_error: object) -> None:
        self._to_read.clear()
        wait([read.future for read in self._reading if read.future is not None])
        while self._reading:
            self._done()

    def bring(self, start: int, target: torch.Tensor, stream: Any = None) -> Any:
        """Copies what comes next, which begins at `start` of its file, to `target`, flat uint8.

        Args:
            stream: for a target on a device; it is current.

        Returns:
            An event after the last copy; None without a stream.

        Raises:
            MappedFileChanged: the file has other bytes now than when it became a mirror.
            OSError: it cannot be read.
        """
        event, at, end = None, start, start + len(target)
        while at < end:
            read = self._proved()
            stretch = read.stretch
            first, last = max(at, stretch.start), min(end, stretch.end)
            content = read.content[first - stretch.start : last - stretch.start]
            target[first - start : last - start].copy_(content, non_blocking=stream is not None)
            if stream is not None:
                event = devices.event_after(stream, target.device)
                read.slot.events[target.device] = event
            at = last
            if stretch.end == last:
                self._done()
        return event

    def differing(self) -> Iterator[tuple[MappedFile, Part, Exception | None]]:
        """Reads all of it; gives each part that has other bytes, or why it cannot be read."""
        while self._to_read or self._reading:
            read = self._current()
            file = read.stretch.file
            if read.error is not None:
                yield from ((file, part, read.error) for part, _, _ in read.stretch.parts)
            else:
                yield from ((file, part, None) for part in self._wrong(read))
            self._done()

    def _proved(self) -> _Read:
        """What comes next, when it is there and proved."""
        read = self._current()
        if not read.is_looked_at:
            read.is_looked_at = True
            if read.error is not None:
                raise read.error
            for part in self._wrong(read):
                read.stretch.file.require_unchanged(part, has_other_bytes=True)
        return read

    def _current(self) -> _Read:
        """What comes next, when it is there. What follows is being read then."""
        while self._to_read and len(self._reading) < _AHEAD:
            self._reading.append(_Read(self._to_read.popleft(), self._ring.lend()))
        read = self._reading[0]
        if read.future is not None:
            read.future.result()
        return read

    def _done(self) -> None:
        self._ring.take_back(self._reading.popleft().slot)

    def _wrong(self, read: _Read) -> list[Part]:
        """The parts that end with this stretch and have other bytes."""
        found = []
        for (part, _start, end), sums in zip(read.stretch.parts, read.sums, strict=True):
            checksum = self._checksums.setdefault(id(part), Checksum(part.end - part.start))
            checksum.add(sums)
            if end == part.end:
                del self._checksums[id(part)]
                if part.checksum is None:
                    part.checksum = checksum.value
                part.is_proved = checksum.value == part.checksum
                if not part.is_proved:
                    found.append(part)
        return found


def _stretches(places: Sequence[tuple[MappedFile, Part]], slot: int) -> list[_Stretch]:
    """What lies side by side is read together, as much as a slot of so many bytes has room for with
    the page that it begins in."""
    found: list[_Stretch] = []
    for file, part in places:
        at = part.start
        while at < part.end:
            last = found[-1] if found else None
            if last is None or last.file is not file or not 0 <= at - last.end < ALIGNMENT:
                last = None
            end = at if last is None else _end(part, last.start, slot)
            if last is None or end <= at:
                last, end = _Stretch(file, at, at), _end(part, at, slot)
                found.append(last)
            last.parts.append((part, at, end))
            at = last.end = end
    return found


def _end(part: Part, start: int, slot: int) -> int:
    """Where what is read of a part ends: with it, or with a whole word, of which the sums are."""
    end = start - start % PAGE + slot
    return part.end if part.end <= end else end - (end - part.start) % 8
