"""Parked bytes that could not be page-locked are tried again, while nothing else happens.

A driver refuses while others hold what it may lock, or, under Windows, while VRAM is full: just
when models are parked. Later there is room, and a restore from locked memory is faster.
"""

from __future__ import annotations

import logging
import weakref

from .. import homes
from ..errors import readable_bytes
from . import arena, limits, pinning
from .blocks import Block

log = logging.getLogger("qmove")

PATIENCE = 6  # doublings: a block that is refused again and again is tried at each 64th look

_looks: weakref.WeakKeyDictionary[Block, int] = weakref.WeakKeyDictionary()  # since the last try


def look() -> int:
    """Asks once more for what was refused, piece by piece; after a refusal twice as many looks pass
    as before it.

    Between two pieces moves go on, and none waits for more than one. Nothing is locked where RAM is
    short: locked memory cannot be swapped out.

    Returns:
        The bytes that were locked.
    """
    locked = 0
    for block in arena.blocks_in_use():
        if block.refusals and _is_due(block):
            before = block.pinned_bytes
            while _lock_a_piece(block):
                pass
            locked += max(0, block.pinned_bytes - before)
    if locked:
        log.info(
            "page-locked %s of parked bytes, for which there was no room", readable_bytes(locked)
        )
    return locked


def _is_due(block: Block) -> bool:
    looks = _looks[block] = _looks.get(block, 0) + 1
    if looks < 1 << min(block.refusals - 1, PATIENCE):
        return False
    _looks[block] = 0
    return True


def _lock_a_piece(block: Block) -> bool:
    if not pinning.is_possible() or _ram_is_short() or not homes.lock.acquire(blocking=False):
        return False
    try:
        return block.ask_again()
    finally:
        homes.lock.release()


def _ram_is_short() -> bool:
    free = limits.host_limits(None, 0)[0].free
    return free < limits.reserve(free + arena.bytes_in_use())
