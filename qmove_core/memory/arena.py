"""The arena: blocks of host memory for parked bytes, sized exactly, reused, given back.

One block serves a whole park. Each storage is an object of its own over its slice, so that a parked
model can be saved and deep-copied without the rest of the arena.

What becomes of a block when its last slice dies:
- nothing of it was pinned: the system gets it back at once;
- it was pinned, which is what costs time: it stays as a spare for the next park. Spares go back
  when they were idle for `IDLE_SECONDS`, when somebody asks (`trim`), and when a new block would
  make the arena hold more than it ever had to hold at once, or pass `ram_limit` or the limit on
  pinned memory. A swap of two models so finds both blocks again, and a model that is gone for good
  does not keep its RAM.

What was pinned is unlocked in the background (`unlocking.py`); who needs that very memory, or
room under a limit, waits for it.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
import time
from collections.abc import Sequence

import torch

from ..interrupts import all_or_nothing, interrupts_deferred
from ..settings import settings
from . import pinning, unlocking
from .blocks import ALIGNMENT, Block, Released
from .shared import WrittenOnce

log = logging.getLogger("qmove")

IDLE_SECONDS = 600.0  # how long a spare may wait for the next park
FULL_ENOUGH = 0.75  # of a spare: what an allocation must fill to get it, so that no RAM is wasted

# Of whoever takes or gives back a spare, or makes a block; never taken by a finalizer.
_lock = threading.RLock()
_blocks: dict[int, Block] = {}  # by id; in use, or spare
_most_held = 0  # bytes that were needed at once: in use, or prepared
_preparers: list[threading.Thread] = []


def bytes_for(sizes: Sequence[int]) -> int:
    """Bytes of host memory that storages of these sizes take together.

    What `prepare` should be asked for.
    """
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def allocate(sizes: Sequence[int], released: Released) -> list[torch.UntypedStorage]:
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
    block, _memory = _lend(bytes_for(sizes))
    storages, start = [], 0
    for size in sizes:
        storages.append(block.storage(start, size, released))
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return storages


def allocate_once(nbytes: int) -> tuple[WrittenOnce, object]:
    """A block for what models share, and what keeps it in use until the first view of it does.

    Raises:
        MemoryError, OSError: the system refused.
    """
    with _lock, interrupts_deferred():
        block = WrittenOnce(nbytes, _on_emptied)
        memory = block.lend()
        _blocks[id(block)] = block
        return block, memory


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
            if settings.ram_limit is not None and bytes_held() + nbytes > settings.ram_limit:
                log.debug("nothing is prepared for the next park: ram_limit is used up")
                return 0
            block = _new_block(nbytes)
            _most_held = max(_most_held, bytes_held())
        if not block.preparing:
            block.preparing = True
            thread = threading.Thread(
                target=_prepare, args=(block,), name="qmove-prepare", daemon=True
            )
            _preparers.append(thread)
            try:
                thread.start()
            except RuntimeError as error:  # a limit on threads, or the interpreter ends
                log.info("nothing is prepared for the next park: %s", str(error))
                _end_preparing(block, thread)
                return 0
        return block.nbytes


def trim(keep: int = 0, *, wait: bool = True) -> int:
    """Gives spare blocks back to the system until at most `keep` bytes of them are left, the
    longest idle first.

    Args:
        wait: until they are unlocked, and the system has them.

    Returns:
        The bytes given back.
    """
    with _lock:
        excess, given_back = spare_bytes() - keep, 0
        for block in sorted(_spares(), key=lambda spare: spare.idle_since):
            if given_back >= excess:
                break
            given_back += _give_back(block)
    if wait:
        unlocking.wait()
    return given_back


def give_back_idle(idle_seconds: float = IDLE_SECONDS) -> int:
    """Gives back the spares that nobody has wanted for so long.

    Returns:
        The bytes given back.
    """
    now = time.monotonic()
    with _lock:
        idle = [
            spare
            for spare in _spares()
            if now - spare.idle_since >= idle_seconds or not spare.is_reusable
        ]
        given_back = sum(_give_back(spare) for spare in idle if not spare.preparing)
    unlocking.wait()
    return given_back


def spare_for(nbytes: int) -> int:
    """Bytes of the spare block that an allocation of `nbytes` would take, and so needs no new
    memory for; 0 if there is none."""
    block = _fitting_spare(nbytes)
    return 0 if block is None else block.nbytes


def is_empty() -> bool:
    """Whether it holds no block at all."""
    return not _blocks


def blocks_in_use() -> list[Block]:
    """Those in which storages are alive."""
    return [block for block in list(_blocks.values()) if block.in_use]


def give_back(block: Block) -> None:
    """Gives a block back in which no storage lies any more, and does not keep it as a spare."""
    with _lock:
        if id(block) in _blocks and not block.in_use and not block.preparing:
            _give_back(block)


def bytes_in_use() -> int:
    """Bytes of the blocks in which storages are alive."""
    return sum(block.nbytes for block in blocks_in_use())


def spare_bytes() -> int:
    """Bytes of the blocks that wait for the next park.

    The system does not count them as available.
    """
    return sum(block.nbytes for block in _spares())


def bytes_held() -> int:
    """Bytes of all blocks, in use or spare."""
    return bytes_in_use() + spare_bytes()


def bytes_taken() -> int:
    """Bytes that the arena takes from the system: also those on their way back."""
    return bytes_held() + unlocking.pending()


def _spares() -> list[Block]:
    return [block for block in list(_blocks.values()) if not block.in_use]


def _lend(nbytes: int) -> tuple[Block, object]:
    """A block, and what keeps it in use."""
    global _most_held
    with _lock, interrupts_deferred():
        block = _fitting_spare(nbytes)
        if block is None:
            _make_way(nbytes)
            block = _new_block(nbytes)
        memory = block.lend()
        _blocks[id(block)] = block
        _most_held = max(_most_held, bytes_in_use())
        return block, memory


def _new_block(nbytes: int) -> Block:
    """A new block of the arena's. With the lock held."""
    try:
        block = Block(nbytes, _on_emptied)
    except (MemoryError, OSError):
        if not trim():
            raise
        block = Block(nbytes, _on_emptied)
    _blocks[id(block)] = block
    return block


def _fitting_spare(nbytes: int) -> Block | None:
    # What is not worth keeping may be on its way out in a finalizer.
    spares = [spare for spare in _spares() if spare.worth_keeping and spare.is_reusable]
    fitting = [spare for spare in spares if spare.nbytes * FULL_ENOUGH <= nbytes <= spare.nbytes]
    return min(fitting, key=lambda spare: spare.nbytes, default=None)


def _make_way(nbytes: int) -> None:
    """Gives back the spares that must not stay beside a new block of `nbytes`."""
    for block in _spares():
        if not block.is_reusable:
            _give_back(block)
    needed = bytes_in_use() + nbytes
    limits = [_most_held, pinning.pin_limit().nbytes, settings.ram_limit]
    trim(max(0, min(limit for limit in limits if limit is not None) - needed), wait=False)
    if settings.ram_limit is not None and bytes_taken() + nbytes > settings.ram_limit:
        unlocking.wait()


def _give_back(block: Block) -> int:
    """Bytes given back, in the background where they are locked. With the lock held."""

    def release() -> int:
        _blocks.pop(id(block), None)  # nobody knows of it now: so it is released, or begun anew
        block.stop_pinning()
        if block.worth_keeping:
            unlocking.begin(block, block.nbytes, block.release)
        else:
            block.release()
        return block.nbytes

    with interrupts_deferred():
        return all_or_nothing(release)


def _on_emptied(block: Block) -> None:
    """The last storage of a block died: a finalizer, so no lock and no driver."""
    if not block.worth_keeping:
        _blocks.pop(id(block), None)


def _prepare(block: Block) -> None:
    try:
        block.pin(0, block.nbytes)
    finally:
        _end_preparing(block, threading.current_thread())


def _end_preparing(block: Block, thread: threading.Thread) -> None:
    with _lock:
        block.preparing = False
        if not block.worth_keeping and not block.in_use and id(block) in _blocks:
            _give_back(block)  # nothing of it could be pinned
    _preparers.remove(thread)


def _at_exit() -> None:
    """Stops the threads while the driver still answers, and leaves the rest to the end of the
    process.

    Unlocking all would take seconds for nothing, and unmapping what is locked is forbidden: so the
    blocks become immortal.
    """
    for block in list(_blocks.values()):
        block.stop_pinning()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(block))
    last = time.monotonic() + unlocking.EXIT_SECONDS
    unlocking.end()
    for thread in list(_preparers):
        if thread.is_alive():  # it may be one that was about to start
            thread.join(max(0.0, last - time.monotonic()))


def _in_forked_child() -> None:
    """The child has the bytes, but neither the registrations nor the threads."""
    global _lock
    _lock = threading.RLock()
    _preparers.clear()
    pinning.forget_in_child()
    unlocking.forget_in_child()
    for block in list(_blocks.values()):
        block.forget_pins()
    for spare in _spares():
        del _blocks[id(spare)]


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
