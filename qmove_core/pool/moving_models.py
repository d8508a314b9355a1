"""What a pool does with its models: loads them, brings them home, sends them away.

Nothing here holds the lock of the pool while it moves something: states say what is reserved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..errors import CannotWriteToDisk, InUse, NotEnoughMemory, Pinned, is_out_of_memory
from ..model.inventory import inventory
from ..moving import moving
from ..parking.requests import move, park, restore
from ..parking.swapping import swap
from .footprint import Footprint
from .keeping import Keeping, Place
from .pooled import Pooled
from .queue import Grant, Queue, Request
from .states import Event, State

log = logging.getLogger("qmove")

ALL = 1 << 62  # bytes: more than there is

FreeOn = Callable[[torch.device], "int | None"]


class Mover:
    """Carries out what was granted."""

    def __init__(
        self, section: AbstractContextManager[Any], queue: Queue, keeping: Keeping[Pooled]
    ) -> None:
        self._section, self._queue, self._keeping = section, queue, keeping

    def carry_out(self, request: Request, grant: Grant) -> bool:
        """Has a model home, and held there for its lease.

        Returns:
            False if there was too little room after all: then the request waits again.

        Raises:
            Whatever the loader, or a move, raises. All models are then where they are found.
        """
        pooled, started = request.pooled, time.perf_counter()
        try:
            is_home = self._make_room(request, grant) and self._bring(request, grant)
        except BaseException:
            self._rest_again([*grant.victims, pooled])
            raise
        if not is_home:
            self._rest_again([*grant.victims, pooled])
            return False
        if grant.came_from in (State.IN_RAM, State.ON_DISK):
            pooled.wakes, pooled.wake_seconds = pooled.wakes + 1, time.perf_counter() - started
        return True

    def _rest_again(self, models: Sequence[Pooled]) -> None:
        for pooled in models:
            if pooled.state.is_moving:
                pooled.rests_again()

    # Away -----------------------------------------------------------------------------------------

    def _make_room(self, request: Request, grant: Grant) -> bool:
        """Sends away those that are to leave. Returns whether all of them could."""
        for victim in grant.victims:
            coming = None
            if victim is grant.victims[-1] and grant.came_from is State.IN_RAM:
                coming = request.pooled
            try:
                self.send_away(victim, coming)
            except (InUse, Pinned, NotEnoughMemory) as error:
                log.info("%s does not leave VRAM: %s", victim.name, str(error))
                request.spared[victim.key] = error.with_traceback(None)
                victim.rests_again()
        return not any(victim.key in request.spared for victim in grant.victims)

    def send_away(self, victim: Pooled, coming: Pooled | None = None) -> None:
        """Parks a model that is reserved for it in RAM or on disk, or lets go of it; whichever the
        budget of RAM has room for. `coming` comes home meanwhile, where RAM holds only one."""
        victim.refresh()
        nbytes, mirrored = sum(victim.taken.values()), victim.mirrored()
        gives = 0 if coming is None else sum(coming.bytes_in_ram().values())
        may_go, may_be_on_disk = not victim.pinned, True
        while True:
            place = self._keeping.keep_within(
                max(0, nbytes - gives),
                victim,
                victim.key,
                mirrored=mirrored,
                may_go=may_go,
                may_be_on_disk=may_be_on_disk,
            )
            if place is Place.RAM:
                break
            if place is Place.NOWHERE:
                if victim.drop():
                    log.info("%s does not stay loaded: RAM has no room for it", victim.name)
                    return
                may_go = False
                continue
            try:
                park(victim.model, to="disk")
                self._keeping.spills += 1
                self._end(victim, Event.ON_DISK)
                return
            except CannotWriteToDisk as error:
                log.warning("%s", str(error))
                may_be_on_disk = False
        try:
            if coming is not None:
                swap(victim.model, coming.model)
            else:
                park(victim.model)
        except NotEnoughMemory:  # RAM is short beyond the budget
            if may_go and victim.drop():
                return
            raise
        self._end(victim, Event.PARKED)
        if coming is not None:
            self._keeping.keep_within()  # what the other one lay in is not needed any more

    def _end(self, pooled: Pooled, event: Event) -> None:
        with self._section:
            pooled.to(event)

    def send_away_now(self, pooled: Pooled) -> bool:
        """Sends one model away, if it is idle. Returns whether it has left."""
        with self._section:
            if pooled.state is not State.HOME or pooled.stays:
                return False
            pooled.to(Event.GO)
        try:
            self.send_away(pooled)
        finally:
            self._rest_again([pooled])
        return pooled.state is not State.HOME

    def free_vram(self, device: torch.device, nbytes: int, free: FreeOn) -> None:
        """Sends idle models away until `free(device)` says that so many bytes are free."""
        spared: set[str] = set()
        while (now := free(device)) is None or now < nbytes:
            with self._section:
                idle = [m for m in self._queue.idle(spared) if m.taken.get(device)]
                if not idle:
                    return
                idle[0].to(Event.GO)
            try:
                self.send_away(idle[0])
            except (InUse, Pinned, NotEnoughMemory) as error:
                log.info("%s does not leave VRAM: %s", idle[0].name, str(error))
                spared.add(idle[0].key)
            finally:
                self._rest_again(idle[:1])

    # Home -----------------------------------------------------------------------------------------

    def _bring(self, request: Request, grant: Grant) -> bool:
        pooled = request.pooled
        if grant.came_from is State.NOT_LOADED:
            self._load(pooled)
            if not self._fits(pooled):
                self.send_away(pooled)
                return False
        on_disk = sum(pooled.bytes_on_disk().values())
        started = time.perf_counter()
        with moving():
            if pooled.is_away:
                restore(pooled.model)
            if pooled.is_away:  # somebody has moved it to the CPU to run there
                move(pooled.model, pooled.home or pooled.device)
            if request.lease is not None:
                pooled.hold()
        self._keeping.note_read(on_disk, time.perf_counter() - started)
        return True

    def _load(self, pooled: Pooled) -> None:
        started = time.perf_counter()
        try:
            model = pooled.loader()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.info("Loading %s ran out of memory: once more, without idle models", pooled.name)
            model = None
        if model is None:
            self.free_vram(pooled.device, ALL, lambda _device: 0)
            model = pooled.loader()
        if not _is_on_an_accelerator(model):
            move(model, pooled.device)
        pooled.take(model, time.perf_counter() - started)
        self._keeping.misses += 1

    def _fits(self, pooled: Pooled) -> bool:
        """Whether a model that was just loaded is within the budgets, now that its size is known;
        idle models leave for it."""
        with self._section:
            pooled.taken = dict(pooled.sizes or {})
        for device in pooled.taken:
            lacking = self._lacking(device)
            if lacking > 0:
                self.free_vram(device, 0, lambda d: -self._lacking(d))
            if self._lacking(device) > 0:
                return False
        return True

    def _lacking(self, device: torch.device) -> int:
        with self._section:
            room = self._queue.room(device)
        return 0 if room is None else -room


def _is_on_an_accelerator(model: Any) -> bool:
    footprint = Footprint(inventory(model))
    return bool(footprint.resident or footprint.parked)
