"""The pool of one replica, as a server sees it."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Any

from ..pool import ModelPool
from ..pool.states import State
from .handles import ModelHandle, figures_of

Woken = Callable[[str, float], None]  # the model, and the seconds that it took to come home


class Replica:
    """A pool, the handles that a server holds of it, and sleep.

    Args:
        pool: with all models that the replica may be asked for.
        timeout: seconds that a request waits for room.
        on_wake: called after a model came home from RAM or disk.
        holds_vram: whether a model stays in VRAM as long as the server holds its handle. Otherwise
            the pool decides, and what the server holds may wait in RAM.
    """

    def __init__(
        self,
        pool: ModelPool,
        *,
        timeout: float | None = None,
        on_wake: Woken | None = None,
        holds_vram: bool = True,
    ) -> None:
        self.pool, self._holds_vram = pool, holds_vram
        self._timeout, self._on_wake = timeout, on_wake
        self._handles: weakref.WeakSet[ModelHandle] = weakref.WeakSet()

    async def handle(self, name: str) -> ModelHandle:
        """What the loader of a server's cache of models returns.

        Raises:
            As `ModelPool.use`.
        """
        lease = self.pool.use(name, timeout=self._timeout)
        await lease.acquire_async()
        self._note(name, lease.came_from, lease.seconds)
        if not self._holds_vram:
            lease.release()
        handle = ModelHandle(self.pool, name, lease if self._holds_vram else None)
        self._handles.add(handle)
        return handle

    async def answer(
        self, handle: ModelHandle, call: Callable[[Any, Any], Any], request: Any
    ) -> Any:
        """Calls `call(model, request)` in a thread, with the model home."""
        lease = handle.use(timeout=self._timeout)
        async with lease as model:
            self._note(handle.name, lease.came_from, lease.seconds)
            return await asyncio.to_thread(call, model, request)

    def _note(self, name: str, came_from: State | None, seconds: float) -> None:
        if self._on_wake is not None and came_from in (State.IN_RAM, State.ON_DISK):
            self._on_wake(name, seconds)

    async def sleep(self, timeout: float | None = None) -> int:
        """Frees all VRAM of the replica when the requests that run have ended; others wait until
        `wake_up`. Returns the bytes that were freed.

        Raises:
            QMoveError: a request did not end in time.
        """
        for handle in list(self._handles):
            handle.let_go()
        return await asyncio.to_thread(self.pool.sleep, timeout=timeout)

    async def wake_up(self) -> None:
        """Ends `sleep`; what was home begins to come home."""
        await asyncio.to_thread(self.pool.wake_up)

    @property
    def is_sleeping(self) -> bool:
        return self.pool.is_sleeping

    def figures(self) -> dict[str, Any]:
        """Flat numbers, and where each model is."""
        by_name = {n: about["state"] for n, about in self.pool.figures()["by_name"].items()}
        return figures_of(self.pool) | {"sleeps": self.is_sleeping, "models": by_name}
