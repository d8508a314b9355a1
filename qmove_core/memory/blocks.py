"""Host memory for parked bytes: page-locked piece by piece, sized exactly, reused, given back.

One anonymous memory map, a block, serves a whole park. Each storage is an object of its own over
its slice, so that a parked model can be saved and deep-copied without the rest of the arena.

What becomes of a block when its last slice dies:
- nothing of it was pinned: the system gets it back at once;
- it was pinned, which is what costs time: it stays as a spare for the next park. Spares go back
when they were idle for
  `IDLE_SECONDS`, when somebody asks (`trim`), and when a new block would make the arena hold more
  than it ever had to hold at once, or pass `ram_limit` or the limit on pinned memory. A swap of two
  models so finds both blocks again, and a model that is gone for good does not keep its RAM.

Finalizers run in the middle of anything, and a Ctrl-C may end them: so they take no lock, call no
driver, and nothing depends on them. A block is in use as long as a weak reference says so; the
finalizer only gives back at once what need not be unlocked first. Unlocking is left to whoever
allocates or trims, and to the thread that looks for idle spares.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy
import torch

from ..interrupts import interrupts_deferred
from ..settings import settings
from . import pinning
from .pages import map_memory, round_to_pages, touch

log = logging.getLogger("qmove")

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype asks for
PIECE = 64 << 20  # bytes of one registration: copies must not cross a piece's border
IDLE_SECONDS = 600.0  # how long a spare may wait for the next park
LOOK_SECONDS = 5.0  # how often a thread looks whether something is to be given back
FULL_ENOUGH = 0.75  # of a spare: what an allocation must fill to get it, so that no RAM is wasted
_STRIPE = 8 << 20  # bytes that one thread touches at a time
_TOUCHERS = min(4, os.cpu_count() or 1)  # more threads than that only wait for the memory


class HostMemory(Protocol):
    """Memory in which storages lie side by side, page aligned, page-locked piece by piece: a block,
    or a mapped file."""

    nbytes: int
    address: int

    def pin(self, start: int, end: int) -> bool:
        """Page-locks every piece that [start, end) touches; says whether all of them are locked."""

    def bytes(self) -> torch.Tensor:
        """The whole of it as a flat uint8 CPU tensor that shares its memory."""


class Block:
    """One anonymous memory map, page aligned, sized exactly.

    Attributes:
        nbytes: its size, without what the system adds to fill the last page.
        address: where it begins.
        preparing: whether a thread is pinning it ahead of its use.
        idle_since: when its last slice died, or when it was made, on the clock of `time.monotonic`.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.preparing = False
        self.idle_since = time.monotonic()
        self._map: mmap.mmap | None = map_memory(nbytes)
        self.address: int = self._whole().ctypes.data
        self._locks = [threading.Lock() for _ in range(-(-nbytes // PIECE))]  # one for each piece
        self._pinned = [False] * len(self._locks)
        self._refused = False  # somebody said no: nobody is asked again
        self._touches: dict[
            int, list[Future[None]]
        ] = {}  # of pieces that were touched, or are just being
        self._lent: Callable[[], numpy.ndarray | None] = lambda: None

    def lend(self) -> numpy.ndarray:
        """The memory as an array of bytes; when it and all slices of it are gone, the block is free
        again."""
        memory = self._whole()
        weakref.finalize(memory, _on_last_death, self).atexit = False
        self._lent = weakref.ref(memory)
        self._refused = False
        return memory

    def bytes(self) -> torch.Tensor:
        """The whole block as a flat uint8 CPU tensor that shares its memory, and keeps it from
        being given back.

        Only for a block in use: one of which a storage is alive.
        """
        memory = self._lent()
        if memory is None:
            raise RuntimeError("a block that no storage lies in has no bytes to look at")
        with torch.inference_mode(False):
            return torch.from_numpy(memory[: self.nbytes])

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
            block while it is in use; what has been locked stays so.
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
                    self._touches[piece] = _touch(memory[piece * PIECE : (piece + 1) * PIECE])
            if not self._pin_piece(index):
                return False
        return True

    def stop_pinning(self) -> None:
        """Lets threads that are pinning it end after the piece they are at."""
        self._refused = True

    def release(self) -> None:
        """Unlocks it and gives it back to the system. Only for a block that is not lent."""
        self.stop_pinning()
        with interrupts_deferred():
            given_back = [self._unpin_piece(index) for index in range(len(self._locks))]
            if all(given_back):
                self._map = None  # a thread that still touches pages keeps it for that long
            else:
                _never_unmapped.append(self)

    def forget_pins(self) -> None:
        """In a forked child: the registrations are the parent's, and so are the threads that held
        the locks."""
        self._locks = [threading.Lock() for _ in self._locks]
        self._pinned = [False] * len(self._locks)
        self._touches.clear()
        self._refused, self.preparing = True, False

    def _whole(self) -> numpy.ndarray:
        memory = self._map
        if memory is None:
            raise _GivenBack
        return numpy.frombuffer(
            memory, dtype=numpy.uint8
        )  # no slice of it: slices would not keep this object alive

    def _piece(self, index: int) -> tuple[int, int]:
        """Address and bytes of a piece; the last one ends with the last page."""
        start = index * PIECE
        return self.address + start, min(PIECE, round_to_pages(self.nbytes) - start)

    def _pin_piece(self, index: int) -> bool:
        for future in self._touches[index]:
            future.result()
        with self._locks[index], interrupts_deferred():
            if not self._pinned[index] and not self._refused:
                self._pinned[index] = pinning.register(*self._piece(index))
                if not self._pinned[index]:
                    self._refused = True
            return self._pinned[index]

    def _unpin_piece(self, index: int) -> bool:
        with self._locks[index]:
            if not self._pinned[index]:
                return True
            self._pinned[index] = False
            return pinning.unregister(self._piece(index)[0])


class _GivenBack(Exception):
    """The block's memory went back to the system."""


def _touch(piece: numpy.ndarray) -> list[Future[None]]:
    global _touchers
    if _touchers is None:
        _touchers = ThreadPoolExecutor(_TOUCHERS, "qmove-touch")
    try:
        return [
            _touchers.submit(touch, piece[at : at + _STRIPE])
            for at in range(0, len(piece), _STRIPE)
        ]
    except (
        RuntimeError
    ):  # the interpreter ends and starts no more threads: locking makes the pages too, only slower
        return []


_lock = (
    threading.RLock()
)  # of whoever takes or gives back a spare, or makes a block; never taken by a finalizer
_blocks: dict[int, Block] = {}  # by id; in use, or spare
# By storage._cdata: the id of its block, where it begins there, and where it ends.
_places: dict[int, tuple[int, int, int]] = {}
_elsewhere: dict[
    int, tuple[HostMemory, int]
] = {}  # the same of storages in memory that is not the arena's
_never_unmapped: list[Block] = []  # the driver would not let go of them
_most_held = 0  # bytes that were needed at once: in use, or prepared
_preparers: list[threading.Thread] = []
_touchers: ThreadPoolExecutor | None = None
_idle_watch: threading.Thread | None = None
_ending = threading.Event()
looks: list[Callable[[], object]] = []  # what else that thread does each time


def bytes_for(sizes: Sequence[int]) -> int:
    """Bytes of host memory that storages of these sizes take together.

    What `prepare` should be asked for.
    """
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def allocate(sizes: Sequence[int], released: Callable[[int], None]) -> list[torch.UntypedStorage]:
    """One host storage of each size, in bytes. They can be read, written and saved, but not
    resized.

    What is in them is undefined: zeros in new memory, another model's bytes in a spare. Nothing is
    pinned here.

    Args:
        released: called with a storage's `_cdata` when that storage dies, in the middle of
            anything: it must take no lock.

    Raises:
        MemoryError, OSError: the system refused.
    """
    if not sizes:
        return []
    block, memory = _lend(bytes_for(sizes))
    storages, start = [], 0
    for size in sizes:
        storages.append(_storage_over(block, memory, start, size, released))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return storages


def storage_at(
    block: Block, start: int, nbytes: int, released: Callable[[int], None]
) -> torch.UntypedStorage:
    """A storage over [start, start + nbytes) of a block that is in use.

    No other storage that is still read may lie there. `released` as for `allocate`.
    """
    memory = block._lent()
    assert memory is not None, "the block is not in use"
    return _storage_over(block, memory, start, nbytes, released)


def gaps_in(block: Block) -> list[tuple[int, int]]:
    """The stretches [start, end) of a block in which no storage lies, in bytes from its start."""
    places = list(_places.values())
    taken = sorted((start, end) for key, start, end in places if key == id(block))
    gaps, free_from = [], 0
    for start, end in [*taken, (block.nbytes, block.nbytes)]:
        if start > free_from:
            gaps.append((free_from, start))
        free_from = max(free_from, -(-end // ALIGNMENT) * ALIGNMENT)
    return gaps


def place_of(storage: torch.UntypedStorage) -> tuple[HostMemory, int] | None:
    """The block that a storage of the arena lies in, or the file it is mapped from (`note_place`),
    and its offset there in bytes; None for any other storage.
    """
    place = _places.get(storage._cdata)
    block = None if place is None else _blocks.get(place[0])
    found = _elsewhere.get(storage._cdata) if place is None or block is None else (block, place[1])
    if found is None or (storage.nbytes() and storage.data_ptr() != found[0].address + found[1]):
        return None
    return found


def note_place(storage: torch.UntypedStorage, memory: HostMemory, start: int) -> None:
    """Lets `place_of` answer for a storage in memory that is not the arena's, until `forget_place`
    when it dies."""
    _elsewhere[storage._cdata] = memory, start


def forget_place(storage_cdata: int) -> None:
    """Undoes `note_place`; for finalizers."""
    _elsewhere.pop(storage_cdata, None)


def prepare(nbytes: int) -> int:
    """Makes a spare block of `nbytes` (see `bytes_for`) and pins it in the background, or one that
    is there and fits.

    The next allocation that fits takes it, also while it is being pinned. It is given back like any
    spare. The caller asks the budget first; beyond `ram_limit` nothing is prepared.

    Returns:
        Bytes of the block; 0 if there is none.
    """
    global _most_held
    if nbytes <= 0 or not pinning.is_possible():
        return 0
    with _lock, interrupts_deferred():
        block = _fitting_spare(nbytes)
        if block is None:
            _make_way(nbytes)
            if (
                settings.ram_limit is not None
                and bytes_in_use() + spare_bytes() + nbytes > settings.ram_limit
            ):
                log.debug("nothing is prepared for the next park: ram_limit is used up")
                return 0
            block = Block(nbytes)
            _blocks[id(block)] = block
            _start_idle_watch()
            _most_held = max(_most_held, bytes_in_use() + spare_bytes())
        if not block.preparing:
            block.preparing = True
            thread = threading.Thread(
                target=_prepare, args=(block,), name="qmove-prepare", daemon=True
            )
            _preparers.append(thread)
            thread.start()
        return block.nbytes


def wait_until_prepared() -> None:
    """Returns when nothing is being pinned in the background."""
    for thread in list(_preparers):
        thread.join()


def trim(keep: int = 0) -> int:
    """Gives spare blocks back to the system until at most `keep` bytes of them are left, the
    longest idle first.

    Returns:
        The bytes given back.
    """
    with _lock:
        excess, given_back = spare_bytes() - keep, 0
        for block in sorted(_spares(), key=lambda spare: spare.idle_since):
            if given_back >= excess:
                break
            given_back += _give_back(block)
        return given_back


def spare_for(nbytes: int) -> int:
    """Bytes of the spare block that an allocation of `nbytes` would take, and so needs no new
    memory for; 0 if there is none."""
    block = _fitting_spare(nbytes)
    return 0 if block is None else block.nbytes


def bytes_in_use() -> int:
    """Bytes of the blocks in which storages are alive."""
    return sum(block.nbytes for block in list(_blocks.values()) if block.in_use)


def spare_bytes() -> int:
    """Bytes of the blocks that wait for the next park.

    The system does not count them as available.
    """
    return sum(block.nbytes for block in _spares())


def bytes_held() -> int:
    """Bytes of all blocks, in use or spare: what the arena takes from the system."""
    return bytes_in_use() + spare_bytes()


def pinned_bytes() -> int:
    """Bytes of the arena that are page-locked now, spares included, rounded up to whole pages."""
    return pinning.registered_bytes()


def _spares() -> list[Block]:
    return [block for block in list(_blocks.values()) if not block.in_use]


def _lend(nbytes: int) -> tuple[Block, numpy.ndarray]:
    global _most_held
    with _lock, interrupts_deferred():
        block = _fitting_spare(nbytes)
        if block is None:
            _make_way(nbytes)
            block = _new_block(nbytes)
        memory = block.lend()
        _blocks[id(block)] = block
        _start_idle_watch()
        _most_held = max(_most_held, bytes_in_use())
        return block, memory


def _new_block(nbytes: int) -> Block:
    try:
        return Block(nbytes)
    except (MemoryError, OSError):
        if not trim():
            raise
        return Block(nbytes)


def _fitting_spare(nbytes: int) -> Block | None:
    # What is not worth keeping may be on its way out in a finalizer.
    spares = [spare for spare in _spares() if spare.worth_keeping]
    fitting = [spare for spare in spares if spare.nbytes * FULL_ENOUGH <= nbytes <= spare.nbytes]
    return min(fitting, key=lambda spare: spare.nbytes, default=None)


def _make_way(nbytes: int) -> None:
    """Gives back the spares that must not stay beside a new block of `nbytes`."""
    needed = bytes_in_use() + nbytes
    limits = [_most_held, pinning.pin_limit().nbytes, settings.ram_limit]
    trim(max(0, min(limit for limit in limits if limit is not None) - needed))


def _give_back(block: Block) -> int:
    """Bytes given back. With the lock held."""
    with interrupts_deferred():
        _blocks.pop(id(block), None)
        block.release()
        return block.nbytes


def _storage_over(
    block: Block, memory: numpy.ndarray, start: int, size: int, released: Callable[[int], None]
) -> torch.UntypedStorage:
    piece = memory[start : start + size]
    storage = torch.from_numpy(piece).untyped_storage()
    _places[storage._cdata] = (id(block), start, start + size)
    # The storage keeps `piece` alive, and nothing else does: when `piece` dies the storage is gone.
    weakref.finalize(piece, _forget, storage._cdata, released).atexit = False
    return storage


def _forget(storage_cdata: int, released: Callable[[int], None]) -> None:
    _places.pop(storage_cdata, None)
    released(storage_cdata)


def _on_last_death(block: Block) -> None:
    """The last slice of a block died: a finalizer, so no lock and no driver."""
    block.idle_since = time.monotonic()
    if not block.worth_keeping:
        _blocks.pop(id(block), None)


def _prepare(block: Block) -> None:
    try:
        block.pin(0, block.nbytes)
    finally:
        with _lock:
            block.preparing = False
            if not block.worth_keeping and not block.in_use and id(block) in _blocks:
                _give_back(block)  # nothing of it could be pinned
        _preparers.remove(threading.current_thread())


def _start_idle_watch() -> None:
    """Starts the thread that looks what is to be given back: there is a block now.

    With the lock held.
    """
    global _idle_watch
    if _ending.is_set() or (_idle_watch is not None and _idle_watch.is_alive()):
        return
    try:
        watch = threading.Thread(
            target=_watch_idle, args=(_ending,), name="qmove-idle", daemon=True
        )
        watch.start()
    except RuntimeError:  # the interpreter ends and starts no more threads
        return
    _idle_watch = watch


def _watch_idle(ending: threading.Event) -> None:
    global _idle_watch
    while not ending.wait(min(LOOK_SECONDS, IDLE_SECONDS / 10)):
        give_back_idle(time.monotonic())
        for look in looks:
            look()
        with _lock:
            if not _blocks:  # whoever makes one starts the next thread
                if _idle_watch is threading.current_thread():
                    _idle_watch = None
                return


def give_back_idle(now: float) -> int:
    """Gives back the spares that nobody has wanted for `IDLE_SECONDS`.

    Returns:
        The bytes given back.
    """
    with _lock:
        idle = [spare for spare in _spares() if now - spare.idle_since >= IDLE_SECONDS]
        return sum(_give_back(spare) for spare in idle if not spare.preparing)


def _at_exit() -> None:
    """Stops the threads while the driver still answers, and leaves the rest to the end of the
    process.

    Unlocking all would take seconds for nothing, and unmapping what is locked is forbidden: so the
    blocks become immortal.
    """
    _ending.set()
    for block in list(_blocks.values()):
        block.stop_pinning()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(block))
    threads = [*_preparers, *([_idle_watch] if _idle_watch is not None else [])]
    for thread in threads:
        thread.join()


def _in_forked_child() -> None:
    """The child has the bytes, but neither the registrations nor the threads."""
    global _lock, _idle_watch, _touchers
    _lock, _idle_watch, _touchers = threading.RLock(), None, None
    _preparers.clear()
    pinning.forget_in_child()
    for block in list(_blocks.values()):
        block.forget_pins()
    for spare in _spares():
        del _blocks[id(spare)]


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
