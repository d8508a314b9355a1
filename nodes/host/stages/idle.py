"""After so many minutes without a use all VRAM goes back to the system, if the user wants that.

What has left comes home by itself when it is used: before its node, or as a parked model wakes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .. import progress, settings
from ..guard import never_fails
from ..panel import events
from . import job_queue, lending

log = logging.getLogger("qmove")


class IdleWatch:
    """Knows when a model was last used, and frees the VRAM when that is long ago.

    Args:
        clock: seconds, of any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_use = clock()
        self._is_released = False
        self._releases_in: int | None = None  # the thread whose moves are no uses
        self._changed = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def note_use(self) -> None:
        """A node begins or ends, or a model has moved. It is cheap."""
        if threading.get_ident() != self._releases_in:
            self._last_use = self._clock()
            self._is_released = False

    def follow_setting(self) -> None:
        """After the setting has changed: there is a thread while the user wants one."""
        with self._lock:
            self._changed.set()
            if settings.idle_minutes() and self._thread is None:
                self.note_use()
                self._thread = threading.Thread(target=self.run, name="qmove idle", daemon=True)
                self._thread.start()

    def run(self, wait: Callable[[float], object] | None = None) -> None:
        """Looks again and again until the setting is 0.

        Args:
            wait: waits so many seconds, or shorter.
        """
        while True:
            self._changed.clear()
            seconds = self.look()
            with self._lock:
                if not settings.idle_minutes():
                    self._thread = None
                    return
            (wait or self._changed.wait)(seconds)

    def look(self) -> float:
        """Frees the VRAM if it is time; returns the seconds until it may be."""
        seconds = settings.idle_minutes() * 60
        left = self._last_use + seconds - self._clock()
        if not seconds or self._is_released:
            return seconds
        if left > 0:
            return left
        if not job_queue.run_if_free(lambda: self._release(seconds)):
            self.note_use()  # a node runs
        return seconds

    @never_fails("free VRAM after idle minutes", None)
    def _release(self, seconds: float) -> None:
        if self._clock() - self._last_use < seconds:
            return  # a node has run while this waited for its turn
        self._releases_in = threading.get_ident()
        self._is_released = True  # unless another thread uses a model meanwhile
        try:
            released = lending.release(by_itself=True)
            log.info("Idle for %.4g minutes. %s", seconds / 60, released["report"])
            if "error" in released:
                log.warning("%s", released["error"])
        except progress.Cancelled as cancelled:
            log.info("%s", cancelled)  # and not tried again before the next use
        finally:
            self._releases_in = None
            events.send_if_changed()


watch = IdleWatch()
