"""`ModelPool`: models by name, more of them than fit a device, each brought home for its use."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch

from .. import devices, hosting
from ..actions import Action
from ..devices import Device
from ..errors import InUse
from ..memory.limits import total_ram
from .desk import Desk, left_of
from .keeping import Keeping
from .leases import Lease, Section
from .moving_models import ALL, Mover
from .pooled import Loader, Pooled
from .queue import Queue
from .states import State

Budget = int | Mapping[Device, int] | None

_NOT_GIVEN: Any = object()
_numbers = itertools.count(1)


class ModelPool:
    """Models by name, of which only some fit a device; the others wait in RAM, or on disk.

        pool = ModelPool(vram=20 << 30, ram=64 << 30)
        pool.add("flux", lambda: FluxPipeline.from_pretrained(...).to("cuda:0"))
        with pool.use("flux") as pipeline:
            image = pipeline(prompt)

    A use loads the model if it is not loaded, brings it home if it is parked, and keeps it there:
    until the lease ends nobody parks it, neither the pool nor `qmove.park` nor a host. First come,
    first served, on each device. What has to leave is parked, the model that was used longest ago
    first; what RAM has no room for goes to disk if `qmove.configure(disk_folder=...)` is set and
    reading it back is quicker than its loader, and is let go of otherwise: its loader runs when it
    is used again. Use a model only while it is on lease, and keep no other reference to it: what
    somebody else holds cannot be let go of. All methods may be called in any thread.

    Args:
        vram: bytes for the models of this pool on each device, or by device. None: what is free.
            What a model computes takes VRAM beside that.
        ram: bytes of RAM for parked models in all, or by the device that they are used on. None:
            half of the RAM. Host copies that make the next park quicker count too.
        device: where models are used, unless their loaders place them on accelerators themselves.
            None: the current accelerator.
        timeout: seconds that a use waits by default; None: as long as it takes.

    Raises:
        UnknownDevice: there is no such device, or no accelerator.
        ValueError: a negative budget.
    """

    def __init__(
        self,
        vram: Budget = None,
        ram: Budget = None,
        *,
        device: Device | None = None,
        timeout: float | None = None,
    ) -> None:
        self.device = devices.resolve(device if device is not None else 0)
        self.timeout = timeout
        self._name = f"ModelPool {next(_numbers)}"
        self._vram, self._ram = _by_device("vram", vram), _by_device("ram", ram)
        self._section = Section()
        self._keeping: Keeping[Pooled] = Keeping(self._ram_limits)
        self._queue = Queue(self._keeping.all, self._vram_budget)
        self._mover = Mover(self._section, self._queue, self._keeping)
        self._desk = Desk(self._section, self._queue, self._keeping, self._mover)
        self._were_home: list[str] | None = None  # when it went to sleep
        self._callbacks = _listen(self)

    # Models ---------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        loader: Loader,
        *,
        nbytes: int | None = None,
        seconds: float | None = None,
        device: Device | None = None,
        pinned: bool = False,
    ) -> None:
        """Makes a model known; nothing is loaded yet.

        Args:
            loader: called without arguments in a thread of the request; returns the model: a
                module, a pipeline, whatever `qmove.park` takes. It keeps no reference to it.
            nbytes: how much VRAM the model takes, if that is known. Otherwise all idle models leave
                for its first load, as nobody can say how much room it needs.
            seconds: how long the loader takes, if that is known better than by measuring.
            device: where it is used, unless the loader places it on an accelerator itself.
            pinned: once it is home it stays there, and is never let go of.

        Raises:
            ValueError: there is a model of this name already.
        """
        pooled = Pooled(
            name,
            loader,
            self.device if device is None else devices.resolve(device),
            self._section,
            nbytes=nbytes,
            seconds=seconds,
            holder=f"{name!r} of {self._name}",
        )
        pooled.pinned = pinned
        with self._section:
            if self._keeping.get(name) is not None:
                raise ValueError(f"There is a model {name!r} in the pool already: remove it first.")
            self._keeping.add(pooled)

    def remove(self, name: str) -> None:
        """Lets go of a model, and forgets its name.

        Raises:
            KeyError: there is none of this name.
            InUse: it is on lease, moves, or somebody waits for it.
        """
        pooled = self._pooled(name)
        with self._section:
            is_asked_for = any(request.pooled is pooled for request in self._queue.waiting)
            if pooled.leases or pooled.state.is_moving or is_asked_for:
                action = Action("move", pooled.model, f"{name!r} out of the pool")
                raise InUse(action, self._name, "has lent it, moves it, or is asked for it")
            self._keeping.remove(pooled)
            pooled.forget()
            self._queue.serve()

    def pin(self, name: str, pinned: bool = True) -> None:
        """Once it is home the model stays there, and is never let go of; or no longer so."""
        with self._section:
            self._pooled(name).pinned = pinned
            self._queue.serve()

    def names(self) -> list[str]:
        """The names of its models, in the order in which they were added."""
        return [pooled.key for pooled in self._keeping.all()]

    def state(self, name: str) -> State:
        """Where a model is now."""
        pooled = self._pooled(name)
        with self._section:
            self._desk.look()
            return pooled.state

    # Uses -----------------------------------------------------------------------------------------

    def use(self, name: str, *, timeout: float | None = _NOT_GIVEN) -> Lease:
        """A lease of a model, for `with` or `async with`, or to `acquire` and `release`.

        Args:
            timeout: seconds to wait for its turn; 0 refuses at once, None waits as long as it
                takes. Not given: that of the pool. Loading and copying is not limited by it.

        Raises (KeyError at once, all others where the lease is entered):
            KeyError: there is no model of this name.
            NotEnoughMemory: there is no room in time, or there can be none: the budget is too
                small, or those who have other models on lease wait themselves.
            QMoveError: its turn did not come in time for another reason, or the pool sleeps.
            Whatever its loader, or a move, raises. The pool is whole then.
        """
        limit = self.timeout if timeout is _NOT_GIVEN else timeout
        return Lease(self._desk, self._pooled(name), limit)

    def prefetch(self, *names: str) -> None:
        """Says what is used next, in this order: these come home in the background as far as there
        is room beside what is on lease, and leave last. Nothing is waited for. Each call replaces
        what the one before has said."""
        self._desk.prefetch([self._pooled(name) for name in names])

    def park(self, name: str) -> bool:
        """Sends a model away now, without waiting for others to need its room: to RAM, to disk, or
        nowhere, as always. Returns whether it has left; one that is on lease does not."""
        return self._mover.send_away_now(self._pooled(name))

    def park_soon(self, name: str) -> None:
        """`park` in the background: for finalizers, which must not wait."""
        if (pooled := self._keeping.get(name)) is not None:
            self._desk.in_background(self._mover.send_away_now, pooled)

    @property
    def is_locked_by_me(self) -> bool:
        """Whether this thread is in the middle of one of the pool's own steps."""
        return self._section.holder == threading.get_ident()

    # All of it ------------------------------------------------------------------------------------

    def figures(self) -> dict[str, Any]:
        """What the pool holds and has done, as plain data; sizes in bytes, times in seconds."""
        with self._section:
            self._desk.look()
            models = {pooled.key: pooled.about() for pooled in self._keeping.all()}
            waiting = [request.pooled.key for request in self._queue.waiting]
        limits, vram = self._ram_limits(), dict[str, int]()
        for about in models.values():
            for device, nbytes in about["vram"].items():
                vram[device] = vram.get(device, 0) + nbytes
        return {
            **self._keeping.figures(limits.get(None, sum(limits.values()))),
            "in_vram": vram,
            "waiting": waiting,
            "sleeps": self.is_sleeping,
            "by_name": models,
        }

    @property
    def is_sleeping(self) -> bool:
        return self._were_home is not None

    def sleep(self, *, timeout: float | None = _NOT_GIVEN) -> int:
        """Frees all VRAM of the pool, when the leases that are out have ended; only pinned models
        stay. Uses wait until `wake_up`.

        Returns:
            The bytes that were freed.

        Raises:
            QMoveError: a lease did not end in time; the pool goes on.
        """
        limit, started = self.timeout if timeout is _NOT_GIVEN else timeout, time.perf_counter()
        with self._section:
            self._queue.is_paused = True
            if self._were_home is None:
                self._were_home = [p.key for p in self._keeping.all() if p.state.takes_vram]
            before = self._vram_taken()
        try:
            self._desk.wait_until_idle(left_of(limit, started))
            for device in before:
                self._mover.free_vram(device, ALL, lambda _device: 0)
        except BaseException:
            self.wake_up(restore=False)
            raise
        with self._section:
            return sum(before.values()) - sum(self._vram_taken().values())

    def wake_up(self, *, restore: bool = True) -> None:
        """Ends `sleep`: uses are granted again, and what was home then begins to come home, unless
        `restore` is false. Of a pool that does not sleep nothing changes."""
        with self._section:
            names, self._were_home = self._were_home or [], None
            self._queue.is_paused = False
            self._queue.serve()
        if restore and names:
            self.prefetch(*(name for name in names if self._keeping.get(name) is not None))

    def close(self) -> None:
        """Lets go of all models; what is on lease lives on with whoever has it. Uses that wait, and
        later ones, are refused."""
        hosting.forget(*self._callbacks)
        self._desk.close()
        with self._section:
            for pooled in self._keeping.all():
                if not pooled.leases and not pooled.state.is_moving:
                    self._keeping.remove(pooled)
                    pooled.forget()

    def __enter__(self) -> ModelPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Budgets --------------------------------------------------------------------------------------

    def _pooled(self, name: str) -> Pooled:
        pooled = self._keeping.get(name)
        if pooled is None:
            known = ", ".join(map(repr, self.names())) or "none"
            raise KeyError(f"There is no model {name!r} in the pool. There is: {known}.")
        return pooled

    def _vram_budget(self, device: torch.device) -> int | None:
        budget = self._vram.get(device, self._vram.get(None))
        if budget is not None:
            return budget
        free = devices.free_memory(device)
        if free is None:
            return None
        own = sum(p.resident.get(device, 0) for p in self._keeping.all())
        return free + own + hosting.yielding_bytes(device)

    def _ram_limits(self) -> Mapping[torch.device | None, int]:
        return self._ram or {None: total_ram() // 2}

    def _vram_taken(self) -> dict[torch.device, int]:
        taken: dict[torch.device, int] = {}
        for pooled in self._keeping.all():
            for device, nbytes in pooled.taken.items():
                taken[device] = taken.get(device, 0) + nbytes
        return taken

    # What others ask of it ------------------------------------------------------------------------

    def _make_room(self, device: torch.device, nbytes: int) -> None:
        """A model comes onto a device that has too little room, also one of others."""
        self._mover.free_vram(device, nbytes, devices.free_memory)

    def _give_up(self, nbytes: int) -> None:
        """RAM is short."""
        self._keeping.give_up(nbytes)

    def _note_move(self) -> None:
        self._desk.is_stale = True


def _by_device(name: str, budget: Budget) -> dict[torch.device | None, int]:
    if budget is None:
        return {}
    given: Mapping[Any, int] = budget if isinstance(budget, Mapping) else {None: budget}
    found = {None if d is None else devices.resolve(d): nbytes for d, nbytes in given.items()}
    if any(nbytes < 0 for nbytes in found.values()):
        raise ValueError(f"{name} is a number of bytes, or one for each device, not {budget!r}.")
    return found


def _listen(pool: ModelPool) -> list[Callable[..., None]]:
    """Has a pool told what others need and move, without keeping it alive."""
    reference = weakref.ref(pool)

    def make_room(device: torch.device, nbytes: int) -> None:
        if (living := reference()) is not None:
            living._make_room(device, nbytes)

    def give_up(nbytes: int) -> None:
        if (living := reference()) is not None:
            living._give_up(nbytes)

    def note_move() -> None:
        if (living := reference()) is not None:
            living._note_move()

    hosting.on_shortage(make_room)
    hosting.on_ram_shortage(give_up)
    hosting.on_move(note_move)
    return [make_room, give_up, note_move]
