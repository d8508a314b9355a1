"""Who gets a model next: first come, first served, on each device.

A request that needs no more room than there is goes ahead only where no earlier one waits for room
on its devices: else a model in steady use would keep others out for good. Whoever holds a lease
already goes ahead of the queue: others may wait for that one.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from ..parking import pins
from .leases import Lease
from .pooled import Pooled
from .states import Event, State

RoomOn = Callable[[torch.device], "int | None"]  # bytes of a budget; None: nobody knows


@dataclass
class Grant:
    """What is to be done for a request whose turn it is.

    Attributes:
        victims: models that leave first; they are reserved.
        came_from: where its own model was.
        is_ready: whether nothing is to be done.
    """

    victims: list[Pooled] = field(default_factory=list)
    came_from: State = State.ON_LEASE
    is_ready: bool = False


@dataclass(eq=False)
class Request:
    """A lease that is asked for. Its `turn` has a `Grant` when it is, or an error.

    Attributes:
        lease: None for a prefetch, which waits for nothing and nobody.
        spared: models that could not leave when they were to, and why.
    """

    pooled: Pooled
    lease: Lease | None
    turn: Future[Grant] = field(default_factory=Future)
    spared: dict[str, Exception] = field(default_factory=dict)


class Queue:
    """The requests that wait, and the models; the lock of the pool is held in all of it."""

    def __init__(self, models: Callable[[], Iterable[Pooled]], budget: RoomOn) -> None:
        self.waiting: list[Request] = []
        self.is_paused = False
        self._models, self._budget = models, budget

    def serve(self) -> None:
        """Grants what can be granted now."""
        blocked: set[torch.device] = set()
        holders = self._owners()
        for request in list(self.waiting):
            devices = self._devices(request.pooled)
            goes_ahead = request.lease is not None and request.lease.claim.owner in holders
            if self.is_paused or (not goes_ahead and not blocked.isdisjoint(devices)):
                blocked |= devices
                continue
            grant = self.try_to_grant(request)
            if grant is not None:
                self.waiting.remove(request)
                request.turn.set_result(grant)
            elif not request.pooled.state.is_moving or request.pooled.state is State.GOING:
                blocked |= devices

    def try_to_grant(self, request: Request) -> Grant | None:
        """What is to be done for a request, with all of it reserved; None if it has to wait."""
        pooled = request.pooled
        if pooled.state is State.ON_LEASE:
            pooled.to(Event.LEASE)
            self._note_lease(request)
            return Grant(is_ready=True)
        if pooled.state.is_moving:
            return None
        victims = self._victims(request)
        if victims is None:
            return None
        grant = Grant(victims, pooled.state)
        for victim in victims:
            victim.to(Event.GO)
        pooled.to(Event.COME)
        self._note_lease(request)
        return grant

    def take_back(self, pooled: Pooled, grant: Grant) -> None:
        """Nobody waits for this grant any more, and nothing of it was done."""
        for victim in grant.victims:
            victim.to(Event.STAYED)
        if not grant.is_ready:
            back = {
                State.HOME: Event.STAYED,
                State.IN_RAM: Event.PARKED,
                State.ON_DISK: Event.ON_DISK,
                State.NOT_LOADED: Event.LET_GO,
            }
            pooled.to(back[grant.came_from])

    def _note_lease(self, request: Request) -> None:
        if request.lease is not None:
            request.pooled.leases.append(request.lease.claim)

    # Room -----------------------------------------------------------------------------------------

    def room(self, device: torch.device) -> int | None:
        """Bytes of the budget that nothing takes; None where nobody knows."""
        budget = self._budget(device)
        if budget is None:
            return None
        return budget - sum(model.taken.get(device, 0) for model in self._models())

    def _victims(self, request: Request) -> list[Pooled] | None:
        """Idle models without which there is room for this one; None where there are too few."""
        pooled, lacking = request.pooled, request.pooled.lacking
        idle = [m for m in self.idle(request.spared) if m is not pooled]
        if request.lease is None:
            idle = [m for m in idle if not m.wanted]
        if lacking is None:  # nobody knows how much: as much as there is without waiting
            return [m for m in idle if m.taken.get(pooled.device) and not m.wanted]
        victims: list[Pooled] = []
        for device, nbytes in lacking.items():
            room = self.room(device)
            if room is None:
                continue
            room += sum(victim.taken.get(device, 0) for victim in victims)
            for model in idle:
                if room >= nbytes:
                    break
                if model.taken.get(device) and model not in victims:
                    victims.append(model)
                    room += model.taken[device]
            if room < nbytes:
                return None
        return victims

    def idle(self, spared: Collection[str]) -> list[Pooled]:
        """Models that may leave VRAM, those first that were used longest ago, and those last that
        come next."""
        idle = [
            model
            for model in self._models()
            if model.state is State.HOME and model.key not in spared and not model.stays
        ]
        return sorted(idle, key=lambda model: (model.wanted, model.used_in))

    # What can never be granted --------------------------------------------------------------------

    def lacks_for_good(self, request: Request) -> tuple[torch.device, int, int] | None:
        """A device where a request waits for what nobody will free, with the bytes that it needs
        there and those of the budget; None where it may be granted some time.

        Nobody frees what is pinned, and what those hold who wait themselves.
        """
        waiting = {id(r.lease.claim.owner) for r in (*self.waiting, request) if r.lease is not None}
        for device, nbytes in (request.pooled.lacking or {}).items():
            budget = self._budget(device)
            if budget is None:
                continue
            stuck = sum(
                model.taken.get(device, 0)
                for model in self._models()
                if model is not request.pooled and self._is_stuck(model, waiting, request)
            )
            if nbytes > budget - stuck:
                return device, nbytes, budget
        return None

    def _is_stuck(self, model: Pooled, waiting: set[int], request: Request) -> bool:
        if model.key in request.spared:
            return True
        if model.leases:
            return any(id(claim.owner) in waiting for claim in model.leases)
        return model.state is State.HOME and (
            model.pinned or (model.model is not None and pins.pin_of(model.model) is not None)
        )

    def on_lease(self, device: torch.device) -> dict[str, int]:
        """Bytes on a device of each model that is on lease there."""
        found: Counter[str] = Counter()
        for model in self._models():
            if model.leases and model.taken.get(device):
                found[model.key] = model.taken[device]
        return dict(found)

    def _owners(self) -> list[object]:
        """Those who hold a lease."""
        held = (model.leases for model in self._models())
        return [claim.owner for claim in itertools.chain.from_iterable(held) if claim.is_held]

    @staticmethod
    def _devices(pooled: Pooled) -> set[torch.device]:
        lacking = pooled.lacking
        known = (pooled.sizes or {}).keys() if not lacking else lacking.keys()
        return set(known) or {pooled.device}
