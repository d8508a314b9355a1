"""A lease: a model of a pool that is home, and stays there until it is given back."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from types import TracebackType
from typing import Any, Protocol

from .pooled import Claim, Pooled
from .states import State


class Lender(Protocol):
    """What a lease asks of its pool."""

    def grant(self, lease: Lease, timeout: float | None) -> None: ...
    async def grant_async(self, lease: Lease, timeout: float | None) -> None: ...
    def give_back(self, claim: Claim) -> None: ...


class Lease:
    """What `ModelPool.use` returns: `with` or `async with` it, or `acquire` it and `release` it.

    Attributes:
        name: of the model in the pool.
        came_from: where the model was when the lease was granted.
        seconds: how long it took to bring the model home, without the time in the queue.
        waited: seconds in the queue.
    """

    def __init__(self, pool: Lender, pooled: Pooled, timeout: float | None) -> None:
        self.name = pooled.key
        self.came_from: State | None = None
        self.seconds = self.waited = 0.0
        self.claim = Claim(pooled, current_owner())
        self._pool, self._timeout, self._was_entered = pool, timeout, False

    @property
    def model(self) -> Any:
        """The model.

        Raises:
            RuntimeError: there is no lease (yet, or any more).
        """
        model = self.claim.pooled.model if self.claim.is_held else None
        if model is None:
            how = "has ended" if self._was_entered else "was not entered"
            raise RuntimeError(
                f"The lease of {self.name!r} {how}: use the model inside of `with pool.use(name)`."
            )
        return model

    def acquire(self) -> Any:
        """Waits until the model is home, and returns it; it stays home until `release`."""
        self._begin()
        self._pool.grant(self, self._timeout)
        return self.model

    async def acquire_async(self) -> Any:
        """The same for a task, whose loop goes on meanwhile."""
        self._begin()
        await self._pool.grant_async(self, self._timeout)
        return self.model

    def release(self) -> None:
        """Gives the lease back; a second time it does nothing. It waits for nobody."""
        self._pool.give_back(self.claim)

    def detach(self) -> Lease:
        """From now on it belongs to no thread or task: who asked for it may end, or wait."""
        self.claim.owner = object()
        return self

    def __del__(self) -> None:
        if self.claim.is_held:  # everybody has forgotten it
            self.release()

    def _begin(self) -> None:
        if self._was_entered:
            raise RuntimeError(f"A lease of {self.name!r} is for one use: ask for another one.")
        self._was_entered, self.claim.owner = True, current_owner()

    def __enter__(self) -> Any:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    async def __aenter__(self) -> Any:
        return await self.acquire_async()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def current_owner() -> object:
    """Who asks: the task of a running loop, or the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    return threading.current_thread() if task is None else task


class Section:
    """The lock of a pool. Leases that come back while it is held, also from finalizers in the
    middle of anything, are taken back by whoever holds it when it lets it go, or by who has it
    next: nobody is seen with a lease that was given back."""

    def __init__(self) -> None:
        self.returned: deque[Claim] = deque()
        self.holder = 0  # the thread that has it
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()
        self.holder = threading.get_ident()
        self._take_all_back()

    def __exit__(self, *_raised: object) -> None:
        self.holder = 0
        self._lock.release()
        self.settle()

    def settle(self) -> None:
        """Takes back what has come back, unless somebody holds the lock, who will do it then."""
        while self.returned and self._lock.acquire(blocking=False):
            self.holder = threading.get_ident()
            try:
                self._take_all_back()
            finally:
                self.holder = 0
                self._lock.release()

    def _take_all_back(self) -> None:
        while self.returned:
            self.take_back(self.returned.popleft())

    def take_back(self, claim: Claim) -> None:
        """Set by the pool; the lock is held."""
        raise NotImplementedError
