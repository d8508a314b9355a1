"""Memory that is unlocked in the background, on its way back to the system.

Unlocking takes a driver 0.2 s for each GB, and some wait for the whole device meanwhile. So nobody
waits for it who does not need that very memory, and it happens under no lock. At the end of the
process it stops: that unlocks all by itself.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass

EXIT_SECONDS = 1.0  # how long the end of the process waits for the piece that is being unlocked

Release = Callable[[Callable[[], bool]], object]  # given what says whether to go on


@dataclass(frozen=True)
class _Waiting:
    """What is to be given back.

    Attributes:
        owner: lives on if the process ends before it was unlocked: unmapping what is locked is
            forbidden.
    """

    owner: object
    nbytes: int
    release: Release


_changed = threading.Condition()  # never taken by a finalizer
_waiting: dict[int, _Waiting] = {}  # by the owner's id
_thread: threading.Thread | None = None
_is_ending = False


def begin(owner: object, nbytes: int, release: Release) -> None:
    """Has `release` called in the background. Beginning the same again does nothing."""
    global _thread
    with _changed:
        _waiting.setdefault(id(owner), _Waiting(owner, nbytes, release))
        if _is_ending:
            _keep(owner)
        if _is_ending or (_thread is not None and _thread.is_alive()):
            return
        thread = threading.Thread(target=_run, name="qmove-unlock", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit on threads
            pass
        else:
            _thread = thread
            return
    _release_all()


def pending() -> int:
    """Bytes that are not given back yet."""
    return sum(each.nbytes for each in list(_waiting.values()))


def wait_for_some() -> bool:
    """Returns when a piece more is unlocked, or soon; False if nothing is on its way back."""
    with _changed:
        if not _waiting or _is_ending:
            return False
        if _thread is not None and _thread.is_alive():
            _changed.wait(0.1)
            return True
    return wait()


def wait() -> bool:
    """Returns when all is given back; says whether there was anything to wait for."""
    with _changed:
        was_pending = bool(_waiting)
        while _waiting and not _is_ending:
            _changed.wait(1.0)
            if _thread is None or not _thread.is_alive():
                break
        else:
            return was_pending
    _release_all()  # the thread was ended from outside
    return was_pending


def end() -> None:
    """Stops it, and keeps what is still locked for the rest of the process."""
    global _is_ending
    _is_ending = True
    for each in list(_waiting.values()):
        _keep(each.owner)
    thread = _thread
    if thread is not None:
        thread.join(EXIT_SECONDS)


def forget_in_child() -> None:
    """After a fork: what is locked belongs to the parent, and so does the thread."""
    global _changed, _thread
    _changed, _thread = threading.Condition(), None
    _waiting.clear()


def _run() -> None:
    global _thread
    while True:
        _release_all()
        with _changed:
            if _is_ending or not _waiting:
                _thread = None
                return


def _release_all() -> None:
    while not _is_ending:
        with _changed:
            each = next(iter(_waiting.values()), None)
        if each is None:
            return
        try:
            each.release(_goes_on)
        finally:
            if not _is_ending:
                with _changed:
                    _waiting.pop(id(each.owner), None)
                    _changed.notify_all()


def _goes_on() -> bool:
    with _changed:
        _changed.notify_all()  # a piece is done
    return not _is_ending


def _keep(owner: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))
