"""Gives back what qmove holds only to be faster next time when RAM gets short for others: another
process, the same cgroup.

What qmove itself allocates asks the budget, which makes room by itself. This is for what others
allocate: nobody asks anybody then, so somebody has to look. The thread that gives back idle spares
does it (`arena.LOOK_SECONDS`); it lives as long as the arena holds any memory.
"""

from __future__ import annotations

import logging

import psutil

from .. import homes
from ..errors import readable_bytes
from . import arena, budget, giving_back

log = logging.getLogger("qmove")

SHARE = 0.05  # of what may be used: what is kept free
ENOUGH = 2 << 30  # bytes to keep free, however small that share is
SMALL_SHARE = (
    1 / 8
)  # unless they would be more than this share: a cgroup of 4 GiB keeps 512 MiB free


def reserve(total: int) -> int:
    """Bytes that are to stay free for others under a limit of `total` bytes: 5 %, and 2 GiB or an
    eighth at least."""
    return max(int(total * SHARE), min(ENOUGH, int(total * SMALL_SHARE)))


def look() -> int:
    """Trims what is lacking to the reserve under the tightest limit on RAM: spares first, then the
    least recently used mirrors.

    `ram_limit` is none of these: it binds only qmove, which keeps it when it allocates. Does
    nothing while a move runs, which may be about to use just that memory: the next round comes
    soon.

    Returns:
        The bytes given back.
    """
    tightest = budget.host_limits(None, 0)[0]
    # What this process has and what is free is the most that it could have there: of a limit whose
    # size nobody tells.
    missing = reserve(tightest.free + _resident()) - tightest.free
    if missing <= 0 or not homes.lock.acquire(blocking=False):
        return 0
    try:
        given = giving_back.trim(missing)
    finally:
        homes.lock.release()
    if given:
        log.info(
            "RAM is short (%s free, %s): gave back %s that were kept for the next parks",
            *(readable_bytes(tightest.free), tightest.name, readable_bytes(given)),
        )
    return given


def _resident() -> int:
    """Bytes of RAM that this process has now."""
    return int(psutil.Process().memory_info().rss)


arena.looks.append(look)
