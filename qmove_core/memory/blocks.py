"""Host memory in which storages lie: what a block of the arena and a mapped file have in common,
the block, and where each storage lies.

Finalizers run in the middle of anything, and a Ctrl-C may end them: so they take no lock, call no
driver, and nothing depends on them. A block is in use as long as a weak reference says so; the
finalizer only gives back at once what need not be unlocked first.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy
import torch

from ..errors import readable_bytes
from ..interrupts import all_or_nothing, interrupts_deferred
from . import pinning
from .pages import (
    advise,
    is_slow,
    make_small_from_now,
    map_memory,
    round_to_pages,
    touch_in_background,
)

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype asks for
FIRST_PIECES = 2  # of a block: how fast their pages are made decides for the rest
PIECE = 64 << 20  # bytes of one registration: copies must not cross a piece's border

Released = Callable[[int], None]  # given the `_cdata` of a storage that died; takes no lock


class HostBlock(ABC):
    """Host memory in which storages lie side by side: a block of the arena, or a mapped file.

    Attributes:
        nbytes: its size.
        address: where it begins.
        is_ram: whether it is RAM of qmove's own, which may be written to and given back. A file is
            neither, and a view of what models share (`shared.py`) is not either.
        is_file: whether it is a file; what comes from it is read and proved by
            `file_reading.ReadAhead`.
        ram: the block of the arena that holds its bytes; None for a file.
    """

    nbytes: int
    address: int
    is_ram: bool
    is_file = False

    @property
    def ram(self) -> Block | None:
        return None

    @abstractmethod
    def memory(self) -> numpy.ndarray:
        """The whole of it as bytes, which keeps it in use.

        Raises:
            RuntimeError: nothing lies in it any more.
        """

    def as_bytes(self) -> torch.Tensor:
        """`memory` as a flat uint8 CPU tensor."""
        with torch.inference_mode(False):
            return torch.from_numpy(self.memory()[: self.nbytes])

    def storage(self, start: int, nbytes: int, released: Released) -> torch.UntypedStorage:
        """A storage over [start, start + nbytes), which can be read, written and saved, but not
        resized. No other storage that is still read may lie there.

        Args:
            released: called when the storage dies, in the middle of anything.
        """
        memory = self.memory()
        # An empty slice would have the block's address: `torch.save` knows storages by theirs.
        piece = memory[start : start + nbytes] if nbytes else numpy.empty(0, numpy.uint8)
        with torch.inference_mode(False):
            storage = torch.from_numpy(piece).untyped_storage()
        # The storage keeps `piece` alive, and nothing else does: when it dies the storage is gone.
        weakref.finalize(piece, released, storage._cdata).atexit = False
        # No line of Python, so that another thread's exception cannot end it. What it would return
        # keeps the block in use.
        kept = None if nbytes else memory
        weakref.finalize(piece, _places.pop, storage._cdata, kept).atexit = False
        _places[storage._cdata] = (self, start, start + nbytes)
        return storage

    def pin(self, start: int, end: int) -> bool:
        """Page-locks what [start, end) touches, where that is possible; says whether it is."""
        return False

    def locked(self, start: int, end: int) -> torch.Tensor | None:
        """The bytes of [start, end), in one piece at most, in page-locked memory; None where they
        cannot be locked."""
        return self.as_bytes()[start:end] if self.pin(start, end) else None

    def are_still_valid(self, starts: Sequence[int]) -> bool:
        """Whether the storages that begin there, to which nobody can have written, have the bytes
        that they had when they became mirrors."""
        return True

    def can_mirror(self, start: int, digest: int) -> bool:
        """Whether bytes with this digest lie at `start` for good."""
        return True


# By storage._cdata: where it lies, and where it ends there.
_places: dict[int, tuple[HostBlock, int, int]] = {}


def place_of(storage: torch.UntypedStorage) -> tuple[HostBlock, int] | None:
    """The block that a storage lies in, and its offset there in bytes; None for any other one."""
    block, start, _end = _places.get(storage._cdata, (None, 0, 0))
    if block is None or (storage.nbytes() and storage.data_ptr() != block.address + start):
        return None
    return block, start


def ram_bytes(storage: torch.UntypedStorage) -> int:
    """Bytes of RAM that a storage takes: none on a device, and none over a mapped file of qmove."""
    if storage.device.type != "cpu":
        return 0
    place = place_of(storage)
    return storage.nbytes() if place is None or place[0].ram is not None else 0


def place_at(storage_cdata: int) -> tuple[HostBlock, int, int] | None:
    """The block that the storage with this `_cdata` lies in, and where it begins and ends there."""
    return _places.get(storage_cdata)


def file_bytes() -> int:
    """Bytes of mapped files that storages look at. They are in the page cache, or on the disk."""
    return sum(end - start for block, start, end in list(_places.values()) if block.is_file)


def storages_in(block: HostBlock) -> dict[int, tuple[int, int]]:
    """Where each storage in a block begins and ends, in bytes from its start, by `_cdata`."""
    return {cdata: (start, end) for cdata, (of, start, end) in list(_places.items()) if of is block}


def shared_parts() -> dict[int, tuple[int, int, int]]:
    """By the `_cdata` of each storage in a view of what models share: the `id` of the block that
    holds its bytes, and where they begin and end there."""
    return {
        cdata: (id(block.ram), start, end)
        for cdata, (block, start, end) in list(_places.items())
        if not block.is_ram and not block.is_file
    }


def gaps_in(block: HostBlock) -> list[tuple[int, int]]:
    """The stretches [start, end) of a block in which no storage lies, in bytes from its start."""
    taken = sorted(storages_in(block).values())
    gaps, free_from = [], 0
    for start, end in [*taken, (block.nbytes, block.nbytes)]:
        if start > free_from:
            gaps.append((free_from, start))
        free_from = max(free_from, -(-end // ALIGNMENT) * ALIGNMENT)
    return gaps


class Block(HostBlock):
    """One anonymous memory map, page aligned, sized exactly, page-locked piece by piece.

    Attributes:
        preparing: whether a thread is pinning it ahead of its use.
        idle_since: when its last slice died, or when it was made, on the clock of `time.monotonic`.
        is_reusable: whether other storages may lie in it when those that did are gone.
        refusals: how often somebody said no to locking a part of it since it is in use.

    Args:
        nbytes: its size.
        emptied: called with it when its last storage died, in the middle of anything.
        memory: the map to use; None: a new one.
    """

    is_ram = True
    is_reusable = True

    def __init__(
        self,
        nbytes: int,
        emptied: Callable[[Block], None] | None = None,
        memory: mmap.mmap | None = None,
    ) -> None:
        self.nbytes = nbytes
        self.preparing = False
        self.idle_since = time.monotonic()
        self._emptied = emptied
        self._map: mmap.mmap | None = map_memory(nbytes) if memory is None else memory
        self.address: int = self._whole().ctypes.data
        self._locks = [threading.Lock() for _ in range(-(-nbytes // PIECE))]  # one for each piece
        self._pinned = [False] * len(self._locks)
        self._refused = False  # somebody said no: nobody is asked again for a while
        self._stopped = False  # for good
        self.refusals = 0
        # Of pieces that were touched, or are just being.
        self._touches: dict[int, list[Future[float]]] = {}
        self._timed: set[int] = set()  # pieces of which it is known how fast they were made
        self._lent: Callable[[], numpy.ndarray | None] = lambda: None

    @property
    def ram(self) -> Block:
        return self

    def lend(self) -> numpy.ndarray:
        """Its memory; when that and all slices of it are gone, the block is free again."""
        memory = self._whole()
        weakref.finalize(memory, self._on_last_death).atexit = False
        self._lent = weakref.ref(memory)
        self._refused, self.refusals = self._stopped, 0
        return memory

    def memory(self) -> numpy.ndarray:
        """What `lend` returned, while it is in use."""
        memory = self._lent()
        if memory is None:
            raise RuntimeError("a block that no storage lies in has no bytes to look at")
        return memory

    @property
    def in_use(self) -> bool:
        """Whether a storage in it is alive, or somebody looks at its bytes."""
        return self._lent() is not None

    @property
    def worth_keeping(self) -> bool:
        """Whether it is pinned, even in part, or just being so: such blocks become spares."""
        return self.preparing or any(self._pinned)

    @property
    def pinned_bytes(self) -> int:
        """Bytes of it that are page-locked, rounded up to whole pages."""
        return sum(self._piece(index)[1] for index, pinned in enumerate(self._pinned) if pinned)

    def pin(self, start: int, end: int) -> bool:
        """Page-locks every piece that [start, end) touches and that is not locked yet.

        May be called by several threads at once; of two that want one piece the second waits. Their
        contents stay.

        Returns:
            Whether all of them are locked. After the first refusal nobody is asked again for this
            block, until somebody looks whether there is room again (`ask_again`) or it is used
            anew; what has been locked stays so.
        """
        wanted = [
            index for index in range(start // PIECE, -(-end // PIECE)) if not self._pinned[index]
        ]
        if not wanted or end <= start:
            return True
        if self._refused or not pinning.is_possible():
            return False
        try:
            memory = self._whole()
        except _GivenBack:  # while it was still being prepared
            return False
        for index in wanted:
            # The piece that follows is most likely wanted next: its pages are made while this one
            # is registered.
            for piece in (index, min(index + 1, len(self._pinned) - 1)):
                if piece not in self._touches:
                    stretch = memory[piece * PIECE : (piece + 1) * PIECE]
                    self._touches[piece] = touch_in_background(stretch)
            if not self._pin_piece(index):
                return False
        return True

    def ask_again(self) -> bool:
        """Locks one piece more of those in which storages lie, where that was refused before. Says
        whether it did; then `pin` locks the others as well."""
        if self._stopped or not self.refusals or not self.in_use:
            return False
        taken = sorted((start, end) for of, start, end in list(_places.values()) if of.ram is self)
        pieces = [
            index for start, end in taken for index in range(start // PIECE, -(-end // PIECE))
        ]
        lacking = next((index for index in pieces if not self._pinned[index]), None)
        if lacking is None:
            return False
        self._refused = False
        return self.pin(lacking * PIECE, lacking * PIECE + 1)

    def discard_empty_pieces(self) -> None:
        """Gives the RAM of those pieces back in which no storage lies any more, while the block is
        in use. What is in them is lost. Only where the system can (Linux)."""
        if self.preparing:
            return
        with interrupts_deferred():
            for start, end in gaps_in(self):
                last = len(self._locks) if end == self.nbytes else end // PIECE
                for index in range(-(-start // PIECE), last):
                    for future in self._touches.pop(index, []):
                        future.result()  # it would make the pages anew
                    if self._unpin_piece(index):
                        advise(*self._piece(index), mmap.MADV_DONTNEED)

    def unlock(self, nbytes: int) -> int:
        """Unlocks pieces until that many bytes are unlocked, and locks no more for a while.

        No copy to or from it may be under way.

        Returns:
            The bytes unlocked.
        """
        self._refused, self.refusals = True, max(1, self.refusals)
        unlocked = 0
        with interrupts_deferred():
            for index, is_pinned in enumerate(self._pinned):
                if is_pinned and unlocked < nbytes:
                    self._unpin_piece(index)
                    unlocked += self._piece(index)[1]
        return unlocked

    def stop_pinning(self) -> None:
        """Lets threads that are pinning it end after the piece they are at."""
        self._refused = self._stopped = True

    def release(self, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Unlocks it and gives it back to the system. Only for a block that is not in use.

        Args:
            goes_on: asked before each piece; after a False the rest stays as it is.
        """
        self.stop_pinning()
        with interrupts_deferred():
            all_or_nothing(lambda: self._release(goes_on))

    def _release(self, goes_on: Callable[[], bool]) -> None:
        given_back = []
        for index in range(len(self._locks)):
            if not goes_on():
                return
            given_back.append(self._unpin_piece(index))
        if all(given_back):
            self._map = None  # a thread that still touches pages keeps it for that long
        else:
            never_unmapped.append(self)

    def forget_pins(self) -> None:
        """In a forked child: the registrations are the parent's, and so are the threads that held
        the locks."""
        self._locks = [threading.Lock() for _ in self._locks]
        self._pinned = [False] * len(self._locks)
        self._touches.clear()
        self._refused, self._stopped, self.preparing = True, True, False

    def _on_last_death(self) -> None:
        self.idle_since = time.monotonic()
        if self._emptied is not None:
            self._emptied(self)

    def _whole(self) -> numpy.ndarray:
        memory = self._map
        if memory is None:
            raise _GivenBack
        # No slice of it: slices would not keep this object alive.
        return numpy.frombuffer(memory, dtype=numpy.uint8)

    def _piece(self, index: int) -> tuple[int, int]:
        """Address and bytes of a piece; the last one ends with the last page."""
        start = index * PIECE
        return self.address + start, min(PIECE, round_to_pages(self.nbytes) - start)

    def _pin_piece(self, index: int) -> bool:
        seconds = sum(future.result() for future in self._touches[index])
        if index not in self._timed and len(self._timed) < FIRST_PIECES:
            self._timed.add(index)
            self._mind_slow_pages(index, seconds)
        with self._locks[index], interrupts_deferred():
            return all_or_nothing(lambda: self._lock_piece(index))

    def _mind_slow_pages(self, index: int, seconds: float) -> None:
        """Where the system takes long to make huge pages, the pieces of this block that follow are
        made of small ones: those are locked more slowly, but need no memory in one piece."""
        address, nbytes = self._piece(index)
        if not is_slow(nbytes, seconds):
            return
        self._timed.update(range(FIRST_PIECES))
        if address + nbytes < self.address + self.nbytes:
            rest, _nbytes = self._piece(index + 1)
            end = self.address + round_to_pages(self.nbytes)
            make_small_from_now(rest, end - rest)
        pinning.say_once(
            logging.INFO,
            "slow pages",
            f"Making {readable_bytes(nbytes)} of host memory took its threads {seconds:.2f} s in "
            "all: the system is busy, or its free memory lies in pieces. Parking goes on without "
            "huge pages. It is faster after other programs are closed, or after a restart; "
            "qmove.prepare(model) makes the memory ahead of its use.",
        )

    def _lock_piece(self, index: int) -> bool:
        if not self._pinned[index] and not self._refused:
            self._pinned[index] = pinning.register(*self._piece(index))
            if not self._pinned[index]:
                self._refused, self.refusals = True, self.refusals + 1
        return self._pinned[index]

    def _unpin_piece(self, index: int) -> bool:
        with self._locks[index]:
            is_unlocked = pinning.unregister(self._piece(index)[0])
            self._pinned[index] = False
            return is_unlocked


never_unmapped: list[Block] = []  # the driver would not let go of them


class _GivenBack(Exception):
    """The block's memory went back to the system."""
