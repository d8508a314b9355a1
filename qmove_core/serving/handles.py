"""What a server that keeps a set of loaded models keeps instead of a model."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from .. import homes
from ..errors import QMoveError
from ..pool import Lease, ModelPool

log = logging.getLogger("qmove")


class ModelHandle:
    """A model of a pool that a server holds: it stays in VRAM until `__del__` is called, by the
    server or by Python, the first time of any number. Then it is parked, unless a request still
    uses it.

        async with handle.use() as model:
            answer = model(...)

    Attributes:
        name: of the model in the pool.
    """

    def __init__(self, pool: ModelPool, name: str, lease: Lease | None) -> None:
        """`lease` is one that was granted; it is the handle's from now on. None: the model is
        loaded, and the pool decides whether it is in VRAM."""
        self.name = name
        self._pool = pool
        self._lease: Lease | None = None if lease is None else lease.detach()
        self._is_held = True

    def use(self, *, timeout: float | None = None) -> Lease:
        """A lease for one request. It brings the model home if the server has dropped the handle
        meanwhile, or if the pool slept."""
        return self._pool.use(self.name, timeout=timeout)

    def let_go(self) -> None:
        """Gives the lease back and leaves the model where it is."""
        lease, self._lease = self._lease, None
        if lease is not None:
            lease.release()

    def __del__(self) -> None:
        if not self.__dict__.pop("_is_held", False):  # it is done, or __init__ failed
            return
        self.let_go()
        if _may_move_here(self._pool):
            try:
                self._pool.park(self.name)
            except (QMoveError, KeyError) as error:  # the next one to come asks for room again
                log.warning("could not park %s: %s", self.name, str(error))
        else:
            self._pool.park_soon(self.name)


def _may_move_here(pool: ModelPool) -> bool:
    """Whether this thread may wait for a move: a finalizer runs in the middle of anything."""
    if homes.lock._is_owned() or pool.is_locked_by_me:  # type: ignore[attr-defined]
        return False
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return True
    return False


def figures_of(pool: ModelPool) -> dict[str, Any]:
    """The figures of a pool that a server shows, as flat numbers."""
    figures = pool.figures()
    states = [about["state"] for about in figures["by_name"].values()]
    return {
        "models_in_vram": states.count("in VRAM") + states.count("in use"),
        "models_in_ram": states.count("in RAM"),
        "models_on_disk": states.count("on disk"),
        "bytes_in_vram": sum(figures["in_vram"].values()),
        "bytes_in_ram": figures["in_ram"],
        "hits": figures["hits"],
        "loads": figures["misses"],
        "seconds_saved": figures["seconds_saved"],
        "waiting": len(figures["waiting"]),
    }
