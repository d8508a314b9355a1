"""Host memory that qmove holds only to be faster next time, and how it is given back: what costs
least to lose goes first.

It goes when somebody asks (`trim`), when it was idle for long, and when RAM gets short for others:
another process, the same cgroup. What qmove itself allocates asks the budget, which makes room by
itself. For what others allocate nobody asks anybody, so a thread looks every `LOOK_SECONDS`; it
lives as long as the arena holds any memory.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable

import psutil

from .. import homes, hosting
from ..errors import readable_bytes
from ..moving import moving
from . import arena, limits, lock_again, mirrors, unlocking

log = logging.getLogger("qmove")

under_way: list[Callable[[], None]] = []  # end restores whose host bytes are held until then

LOOK_SECONDS = 5.0


def trim(nbytes: int | None = None) -> int:
    """Gives host memory back to the system that no parked model lies in; the next parks are slower
    for it.

    Spare blocks go first, then the host copies of resident models, the least recently used first.
    A model that still arrives is waited for: its host bytes are of no more use then.

    Args:
        nbytes: bytes to give back at least; None for all there are.

    Returns:
        Bytes given back; less than asked if there are no more.
    """
    given = _begin_to_trim(nbytes)
    unlocking.wait()  # under no lock: moves that need none of it go on
    return given


@moving()
def _begin_to_trim(nbytes: int | None) -> int:
    """`trim`, but what was locked is unlocked in the background."""
    for end in under_way:
        end()
    before = arena.bytes_held()
    wanted = arena.spare_bytes() + mirrors.nbytes() if nbytes is None else nbytes
    arena.trim(max(0, arena.spare_bytes() - wanted), wait=False)
    missing = wanted - (before - arena.bytes_held())
    if missing > 0:
        mirrors.release(missing)  # memory that was never pinned goes back by itself
        missing = wanted - (before - arena.bytes_held())
        arena.trim(max(0, arena.spare_bytes() - max(0, missing)), wait=False)
    return before - arena.bytes_held()


def make_room(nbytes: int) -> int:
    """Trims `nbytes`; where that is not enough, the host of this program is asked to let go of
    models that it keeps. Returns the bytes that this process's own memory gave back, or
    will when it is unlocked."""
    given = _begin_to_trim(nbytes)
    if given < nbytes:
        hosting.ask_for_ram(nbytes - given)
        given += _begin_to_trim(nbytes - given)  # where its models lay is spare now
    return given


def trim_under_pressure() -> int:
    """Makes room for what is lacking to the reserve under the tightest limit on RAM.

    `ram_limit` is none of these: it binds only qmove, which keeps it when it allocates. Does
    nothing while a move runs, which may be about to use just that memory: the next round comes
    soon.

    Returns:
        The bytes given back.
    """
    tightest = limits.host_limits(None, 0)[0]
    # What this process has and what is free is the most that it could have there: of a limit whose
    # size nobody tells.
    missing = limits.reserve(tightest.free + _resident()) - tightest.free
    if missing <= 0 or not homes.lock.acquire(blocking=False):
        return 0
    try:
        given = make_room(missing)
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


class Watch:
    """A thread that gives back what was idle for long, and what others lack, and locks what was
    refused before. It ends when the arena holds nothing.

    Args:
        look_seconds: how often it looks.
        idle_seconds: how long a spare may wait for the next park.
    """

    def __init__(
        self, look_seconds: float = LOOK_SECONDS, idle_seconds: float = arena.IDLE_SECONDS
    ) -> None:
        self._look_seconds, self._idle_seconds = look_seconds, idle_seconds
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts it, unless it runs: the arena holds a block now."""
        with self._lock:
            if self._ending.is_set() or (self.thread is not None and self.thread.is_alive()):
                return
            thread = threading.Thread(target=self._run, name="qmove-idle", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit on threads, or the interpreter ends
                return
            self.thread = thread

    def end(self) -> None:
        """Ends it; it starts no more."""
        self._ending.set()
        if self.thread is not None:
            self.thread.join(unlocking.EXIT_SECONDS)

    def forget(self) -> None:
        """In a forked child, which has no such thread."""
        self._ending, self._lock, self.thread = threading.Event(), threading.Lock(), None

    def _run(self) -> None:
        while not self._ending.wait(min(self._look_seconds, self._idle_seconds / 10)):
            arena.give_back_idle(self._idle_seconds)
            trim_under_pressure()
            lock_again.look()
            with self._lock:
                if arena.is_empty():  # whoever makes a block starts the next thread
                    self.thread = None
                    return


watch = Watch()
atexit.register(watch.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=watch.forget)
