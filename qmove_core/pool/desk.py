"""Where leases are asked for, granted and given back, and what is done ahead of its use."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotInTime
from typing import TypeVar

import torch

from ..actions import Action
from ..errors import NotEnoughDeviceMemory, QMoveError, first_of, readable_bytes
from .keeping import Keeping
from .leases import Lease, Section
from .moving_models import Mover
from .pooled import Claim, Pooled
from .queue import Grant, Queue, Request
from .states import Event, State

log = logging.getLogger("qmove")

T = TypeVar("T")

_RESTING = frozenset({State.HOME, State.IN_RAM, State.ON_DISK})


class Desk:
    """Attributes:
    is_stale: something has moved: others may have moved models of the pool.
    is_closed: nothing is granted any more.
    """

    def __init__(
        self, section: Section, queue: Queue, keeping: Keeping[Pooled], mover: Mover
    ) -> None:
        self.is_stale = self.is_closed = False
        self._section, self._queue = section, queue
        self._keeping, self._mover = keeping, mover
        self._background = ThreadPoolExecutor(1, "qmove-pool")
        self._next: list[str] = []
        self._until_idle: list[Future[None]] = []
        section.take_back = self._take_back  # type: ignore[method-assign]

    # One lease ------------------------------------------------------------------------------------

    def grant(self, lease: Lease, timeout: float | None) -> None:
        """What `Lease.acquire` calls."""
        request, started = self._ask(lease), time.perf_counter()
        while True:
            try:
                grant = request.turn.result(left_of(timeout, started))
            except NotInTime:
                grant = self._withdraw(request, timeout)
            except BaseException:
                self._abandon(request)
                raise
            lease.waited = time.perf_counter() - started
            if self._carry_out(request, grant):
                return

    async def grant_async(self, lease: Lease, timeout: float | None) -> None:
        """What `Lease.acquire_async` calls."""
        request, started = self._ask(lease), time.perf_counter()
        while True:
            turn = asyncio.wrap_future(request.turn)
            try:
                await asyncio.wait([turn], timeout=left_of(timeout, started))
            except BaseException:  # cancelled
                self._abandon(request)
                raise
            grant = turn.result() if turn.done() else self._withdraw(request, timeout)
            lease.waited = time.perf_counter() - started
            if grant.is_ready:
                done = self._carry_out(request, grant)
            else:
                call = asyncio.to_thread(self._carry_out, request, grant)
                done = await _to_its_end(call, lambda: self.give_back(lease.claim))
            if done:
                return

    def give_back(self, claim: Claim) -> None:
        """What `Lease.release` calls. It waits for nobody, so that finalizers may call it."""
        self._section.returned.append(claim)
        self._section.settle()
        self._begin_prefetch()

    def _ask(self, lease: Lease) -> Request:
        request = Request(lease.claim.pooled, lease)
        with self._section:
            if self.is_closed:
                raise QMoveError(f"Cannot use {lease.name!r}: the pool is closed.")
            self._keeping.clock += 1
            self.look()
            self._refuse_what_is_hopeless(request)
            self._queue.waiting.append(request)
            self._queue.serve()
        return request

    def _take_back(self, claim: Claim) -> None:
        if claim.is_held:
            claim.is_held = False
            claim.pooled.used_in = self._keeping.clock
            self._end_claim(claim)
            self._serve()

    def _end_claim(self, claim: Claim) -> None:
        pooled = claim.pooled
        pooled.leases.remove(claim)
        if not pooled.leases and pooled.state is State.ON_LEASE:
            pooled.to(Event.RELEASE)
            pooled.release()

    def _serve(self) -> None:
        self.look()
        self._queue.serve()
        if self._until_idle and not self.is_busy:
            for waiting in self._until_idle:
                waiting.set_result(None)
            self._until_idle.clear()

    def look(self) -> None:
        """Sees what others have moved; the lock of the pool is held."""
        stale, self.is_stale = self.is_stale, False
        for pooled in self._keeping.all() if stale else ():
            if pooled.state in _RESTING:
                pooled.to(pooled.found())

    # One that is not granted ----------------------------------------------------------------------

    def _refuse_what_is_hopeless(self, request: Request) -> None:
        lacking = self._queue.lacks_for_good(request)
        if lacking is not None:
            device, needed, budget = lacking
            error = self._no_room(
                request,
                device,
                needed,
                budget,
                "What is on lease or pinned there will not come free: raise the budget, unpin a "
                "model, or give a lease back before you ask for the next one.",
            )
            raise error from next(iter(request.spared.values()), None)

    def _withdraw(self, request: Request, timeout: float | None) -> Grant:
        """The time of a request is over, unless it was granted just now."""
        with self._section:
            if request not in self._queue.waiting:
                return request.turn.result(0)
            self._queue.waiting.remove(request)
            error = self._too_late(request, timeout or 0.0)
            self._serve()
        raise error

    def _too_late(self, request: Request, timeout: float) -> QMoveError:
        name = request.pooled.key
        if self._queue.is_paused:
            return QMoveError(f"Cannot use {name!r}: the pool sleeps. Call wake_up() first.")
        for device, needed in (request.pooled.lacking or {}).items():
            room = self._queue.room(device)
            if room is not None and room < needed:
                advice = f"It waited for {timeout:g} s. Try again when a lease has ended."
                return self._no_room(request, device, needed, max(0, room), advice)
        return QMoveError(
            f"Cannot use {name!r} within {timeout:g} s: it is {request.pooled.state.value}, and "
            "others who want their models on that device came first. Wait longer, or try again."
        )

    def _no_room(
        self, request: Request, device: torch.device, needed: int, free: int, advice: str
    ) -> NotEnoughDeviceMemory:
        held = [f"{n} {readable_bytes(b)}" for n, b in self._queue.on_lease(device).items()]
        limit = f"VRAM budget of the pool; on lease: {first_of(held) or 'nothing'}"
        action = Action("restore", request.pooled.model)
        action.infinitive = f"bring {request.pooled.key!r} home"
        action.gerund = f"Bringing {request.pooled.key!r} home"
        return NotEnoughDeviceMemory(action, str(device), needed, free, limit, advice)

    def _abandon(self, request: Request) -> None:
        """Whoever asked waits no more."""
        with self._section:
            if request in self._queue.waiting:
                self._queue.waiting.remove(request)
            elif request.turn.done() and request.turn.exception() is None:
                grant = request.turn.result()
                self._forget_claim(request)
                self._queue.take_back(request.pooled, grant)
            self._serve()

    def _forget_claim(self, request: Request) -> None:
        if request.lease is not None and request.lease.claim in request.pooled.leases:
            self._end_claim(request.lease.claim)

    # One that is granted --------------------------------------------------------------------------

    def _carry_out(self, request: Request, grant: Grant) -> bool:
        """Returns whether the model is home. Otherwise the request waits for its next turn, as the
        first one."""
        lease, done, started = request.lease, False, time.perf_counter()
        try:
            done = grant.is_ready or self._mover.carry_out(request, grant)
        finally:
            with self._section:
                if done:
                    self._hand_over(request, grant, time.perf_counter() - started)
                else:
                    self._forget_claim(request)
                self._serve()
        if not done and lease is not None:
            request.turn = Future()
            with self._section:
                self._refuse_what_is_hopeless(request)
                self._queue.waiting.insert(0, request)
                self._serve()
        return done

    def _hand_over(self, request: Request, grant: Grant, seconds: float) -> None:
        pooled, lease = request.pooled, request.lease
        if not grant.is_ready:
            pooled.to(Event.ARRIVED)
        if lease is None:
            return
        if not grant.is_ready:
            pooled.to(Event.LEASE)
        lease.claim.is_held, lease.came_from, lease.seconds = True, grant.came_from, seconds
        pooled.wanted = False
        if grant.came_from is not State.NOT_LOADED:
            self._keeping.hits += 1
            self._keeping.seconds_saved += pooled.seconds

    # Ahead of its use, and all of it --------------------------------------------------------------

    def prefetch(self, models: Sequence[Pooled]) -> None:
        with self._section:
            for pooled in self._keeping.all():
                pooled.wanted = pooled in models
            self._next = [pooled.key for pooled in models]
        self._begin_prefetch()

    def _begin_prefetch(self) -> None:
        if self._next:
            self.in_background(self._bring_next)

    def in_background(self, call: Callable[..., object], *arguments: object) -> None:
        """Calls something in the pool's own thread, unless the pool is closed."""
        if self.is_closed:
            return
        try:
            self._background.submit(call, *arguments)
        except RuntimeError:  # the interpreter ends
            log.debug("nothing is done in the background any more")

    def _bring_next(self) -> None:
        for name in list(self._next):
            pooled = self._keeping.get(name)
            if pooled is None or not pooled.wanted:
                continue
            request = Request(pooled, None)
            with self._section:
                self.look()
                if self._queue.waiting or self._queue.is_paused or self.is_closed:
                    return
                if pooled.state in (State.HOME, State.ON_LEASE):
                    continue
                grant = self._queue.try_to_grant(request)
            if grant is None:
                return
            try:
                self._carry_out(request, grant)
            except Exception as error:  # whoever uses the model gets it
                pooled.wanted = False
                log.warning("could not bring %s home ahead of its use: %s", name, str(error))

    @property
    def is_busy(self) -> bool:
        """Whether anything is on lease, or moves; the lock of the pool is held."""
        return any(pooled.leases or pooled.state.is_moving for pooled in self._keeping.all())

    def wait_until_idle(self, timeout: float | None) -> None:
        """Waits until no lease is out and nothing moves.

        Raises:
            QMoveError: not in time.
        """
        idle: Future[None] = Future()
        with self._section:
            if not self.is_busy:
                return
            self._until_idle.append(idle)
        try:
            idle.result(timeout)
        except NotInTime:
            with self._section:
                if idle.done():
                    return
                self._until_idle.remove(idle)
                names = first_of([p.key for p in self._keeping.all() if p.leases])
            raise QMoveError(
                f"Cannot put the pool to sleep: after {timeout:g} s these are still on lease: "
                f"{names}. Try again when they have ended."
            ) from None

    def close(self) -> None:
        self.is_closed = True
        self._background.shutdown(wait=True)


def left_of(timeout: float | None, started: float) -> float | None:
    """What is left of so many seconds that began at `started`; None for no limit."""
    return None if timeout is None else max(0.0, timeout - (time.perf_counter() - started))


async def _to_its_end(call: Awaitable[T], undo: Callable[[], None]) -> T:
    """Waits for a move, which nobody can stop; a cancelled caller gets what it did undone."""
    task = asyncio.ensure_future(call)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:

        def end(done: asyncio.Future[T]) -> None:
            if not done.cancelled() and done.exception() is None:
                undo()

        task.add_done_callback(end)
        raise
