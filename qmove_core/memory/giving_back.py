"""Host memory that qmove holds only to be faster next time, and how it is given back: what costs
least to lose goes first."""

from __future__ import annotations

from .. import homes
from . import arena, mirrors


def held_back() -> int:
    """Bytes that could be given back: spare blocks of the arena, and mirrors."""
    return arena.spare_bytes() + mirrors.nbytes()


def trim(nbytes: int | None = None) -> int:
    """Gives host memory back to the system that no parked model lies in; the next parks are slower
    for it.

    Spare blocks go first, then the host copies of resident models, the least recently used first.

    Args:
        nbytes: bytes to give back at least; None for all there are.

    Returns:
        Bytes given back; less than asked if there are no more.
    """
    with homes.lock:
        before = arena.bytes_held()
        wanted = held_back() if nbytes is None else nbytes
        arena.trim(max(0, arena.spare_bytes() - wanted))
        missing = wanted - (before - arena.bytes_held())
        if missing > 0:
            mirrors.release(missing)  # memory that was never pinned goes back by itself
            missing = wanted - (before - arena.bytes_held())
            arena.trim(max(0, arena.spare_bytes() - max(0, missing)))
        return before - arena.bytes_held()
