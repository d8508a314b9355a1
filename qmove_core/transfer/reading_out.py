"""Reads storages out to wherever their bytes are to be written, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import devices
from ..interrupts import cleaning_up
from ..memory.blocks import place_of
from ..memory.file_reading import ReadAhead
from ..memory.mapped_files import WINDOW, MappedFile
from ..memory.ring import SLOTS, Ring
from ..storages import as_bytes


@dataclass(slots=True)
class Piece:
    """Some bytes of a storage, on the host.

    Attributes:
        index: which of the storages.
        start: where they begin in it.
        content: flat uint8; good until the next piece is asked for.
        is_last: whether the storage ends with them.
    """

    index: int
    start: int
    content: torch.Tensor
    is_last: bool


def pieces_of(storages: Sequence[torch.UntypedStorage]) -> Generator[Piece, None, None]:
    """The bytes of all these storages, in order. While one piece is looked at, the next one is
    under way from its device.

    Close it: it waits for its copies and gives back the page-locked memory they go through.

    Raises:
        MappedFileChanged: a storage lies in a file that has other bytes now.
        MemoryError, OSError: no memory for the windows.
    """
    nbytes_there = sum(s.nbytes() for s in storages if s.device.type != "cpu")
    arriving = _FromDevices(nbytes_there)
    places = [place_of(storage) for storage in storages if storage.device.type == "cpu"]
    ring = Ring(sum(s.nbytes() for s in storages if s.device.type == "cpu"))
    has_failed = False
    try:
        with (
            torch.no_grad(),
            torch.inference_mode(False),
            ReadAhead(ring, places, locked=False) as files,
        ):
            waiting: tuple[Piece, Callable[[], None]] | None = None
            for index, storage in enumerate(storages):
                nbytes = storage.nbytes()
                step = WINDOW if storage.device.type == "cpu" else arriving.step()
                for start in range(0, max(nbytes, 1), step):
                    end = min(nbytes, start + step)
                    content, wait = _begin(storage, start, end, files, arriving)
                    begun = Piece(index, start, content, end == nbytes), wait
                    if waiting is not None:
                        waiting[1]()
                        yield waiting[0]
                    waiting = begun
            if waiting is not None:
                waiting[1]()
                yield waiting[0]
    except BaseException:
        has_failed = True
        raise
    finally:
        try:
            arriving.end(has_failed)
        finally:
            ring.end()


def _begin(
    storage: torch.UntypedStorage, start: int, end: int, files: ReadAhead, arriving: _FromDevices
) -> tuple[torch.Tensor, Callable[[], None]]:
    """The bytes of a piece, and what waits until they are there."""
    if end == start:
        return torch.empty(0, dtype=torch.uint8, device="cpu"), _nothing
    if storage.device.type != "cpu":
        return arriving.copy(storage, start, end)
    place = place_of(storage)
    if place is not None and isinstance(place[0], MappedFile):
        content = torch.empty(end - start, dtype=torch.uint8, device="cpu")
        files.bring(place[1] + start, content)
        return content, _nothing
    return as_bytes(storage)[start:end], _nothing


def _nothing() -> None:
    pass


class _FromDevices:
    """Bytes that come from a device, through the slots of a ring."""

    def __init__(self, nbytes: int) -> None:
        self._ring = Ring(min(nbytes, SLOTS * WINDOW))
        self._streams: dict[int, Any] = {}

    def step(self) -> int:
        """The most bytes of a piece."""
        return min(WINDOW, self._ring.open())

    def copy(
        self, storage: torch.UntypedStorage, start: int, end: int
    ) -> tuple[torch.Tensor, Callable[[], None]]:
        """Begins to copy, behind all work queued for the device; and what waits for that."""
        device = storage.device
        stream = devices.own_stream(device, "out")
        self._streams[id(stream)] = stream
        devices.wait_for_work(stream, device)
        with devices.on_stream(stream, device):
            return self._ring.show(stream, as_bytes(storage)[start:end])

    def end(self, has_failed: bool) -> None:
        """Waits for all copies, and gives the memory back."""
        streams, self._streams = list(self._streams.values()), {}
        try:
            with cleaning_up(has_failed):
                for stream in streams:
                    stream.synchronize()
        finally:
            self._ring.end()
