"""What qmove has done in this process, and what it holds now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .. import homes
from ..memory import arena, blocks, mirrors, pinning
from . import records


@dataclass(frozen=True)
class Stats:
    """What qmove holds now, and what it has done since the process started.

    Attributes:
        parked_models: models of which anything is parked now.
        parked_bytes: bytes parked now, by the device they came from.
        arena_bytes: host memory in which parked models lie, and models moved to the CPU.
        mirror_bytes: host memory with copies of resident models, so that parking them again copies
            only what changed.
        spare_bytes: host memory kept ready for the next park. This and the mirrors are given back
            when RAM gets short, or by `qmove.trim()`.
        pinned_bytes: of all three, bytes that are page-locked.
        parks: how many there were.
        restores: how many there were.
        moves: how many there were.
        copied_bytes: bytes copied by all of them.
        file_bytes: bytes of mapped files that stand for host memory (`qmove.mirror_files`). They
            cost page cache, and are in no other figure.
        shared_bytes: bytes parked now that take no host memory, since another parked model has the
            same weights there.
    """

    parked_models: int
    parked_bytes: dict[str, int]
    arena_bytes: int
    mirror_bytes: int
    spare_bytes: int
    pinned_bytes: int
    parks: int
    restores: int
    moves: int
    copied_bytes: int
    file_bytes: int
    shared_bytes: int


_done: Counter[str] = Counter()


def count(done: str, copied_bytes: int) -> None:
    """Counts one move: `done` is "parked", "restored" or "moved"."""
    _done[done] += 1
    _done["copied_bytes"] += copied_bytes


def stats() -> Stats:
    """What qmove holds now, and what it has done since the process started."""
    with homes.lock:
        return Stats(
            parked_models=len(records.parked_models()),
            parked_bytes=records.parked_bytes(),
            arena_bytes=arena.bytes_in_use() - mirrors.nbytes(),
            mirror_bytes=mirrors.nbytes(),
            spare_bytes=arena.spare_bytes(),
            pinned_bytes=pinning.registered_bytes(),
            parks=_done["parked"],
            restores=_done["restored"],
            moves=_done["moved"],
            copied_bytes=_done["copied_bytes"],
            file_bytes=blocks.file_bytes(),
            shared_bytes=mirrors.shared_bytes(),
        )
