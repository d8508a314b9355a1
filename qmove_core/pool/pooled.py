"""One model of a pool: its name and loader, where it is, and who has it on lease."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CannotWriteToDisk, NotEnoughMemory, QMoveError
from ..model.inventory import inventory
from ..parking import pins
from ..parking.requests import park
from ..parking.weakly import Weakly
from .footprint import Footprint
from .keeping import Kept
from .states import Event, State, after

log = logging.getLogger("qmove")

Loader = Callable[[], Any]


@dataclass(eq=False)
class Claim:
    """What a pool has noted of a lease: without the lease itself, so that one that everybody has
    forgotten is given back.

    Attributes:
        owner: the thread or task that asked for it.
        is_held: whether it was granted, and not given back.
    """

    pooled: Pooled
    owner: object
    is_held: bool = False


class Pooled(Kept):
    """Attributes:
    loader: gives the model when it is called.
    device: where it is used, unless its loader places it on an accelerator itself.
    sizes: its bytes by home; of one that was never loaded what was said of it, None for unknown.
    state: see `states.py`. Changed by who holds the lock of the pool.
    leases: the claims of those that were granted and not given back.
    taken: bytes of VRAM that it takes, or that are reserved for it, by device.
    wanted: whether the caller has said that it comes next.
    pinned: it does not leave VRAM, once it is there, and is not let go of.
    loads, wakes: how often it was loaded, and came home from RAM or disk.
    wake_seconds: how long it took to come home the last time.
    """

    def __init__(
        self,
        name: str,
        loader: Loader,
        device: torch.device,
        lock: AbstractContextManager[Any],
        *,
        nbytes: int | Mapping[torch.device, int] | None,
        seconds: float | None,
        holder: str,
    ) -> None:
        self.key, self.loader, self.device = name, loader, device
        self.sizes: dict[torch.device, int] | None = None
        if nbytes is not None:
            self.sizes = dict(nbytes) if isinstance(nbytes, Mapping) else {device: nbytes}
        self.seconds, self.used_in = seconds or 0.0, 0
        self.state = State.NOT_LOADED
        self.model: Any = None
        self.leases: list[Claim] = []
        self.taken: dict[torch.device, int] = {}
        self.wanted = self.pinned = False
        self.loads = self.wakes = 0
        self.wake_seconds = 0.0
        self._says_seconds = seconds is not None
        self._footprint: Footprint | None = None
        self._lock, self._holder = lock, holder
        self._pin: pins.Pin | None = None

    # What the engine asks --------------------------------------------------------------------

    @property
    def name(self) -> str:
        return self.key

    @property
    def stays(self) -> bool:
        return (
            bool(self.leases)
            or self.pinned
            or self.state.is_moving
            or self.model is None
            or pins.pin_of(self.model) is not None
        )

    def identities(self) -> set[Any]:
        return {self.key}

    def bytes_in_ram(self) -> dict[Any, int]:
        return {self.key: self._footprint.in_ram if self._footprint else 0}

    def bytes_in_all(self) -> dict[Any, int]:
        return {self.key: self.nbytes if self.model is not None else 0}

    def bytes_on_disk(self) -> dict[Any, int]:
        return {self.key: self._footprint.on_disk if self._footprint else 0}

    def uselessness(self, clock: int) -> float:
        return 0.0 if self.wanted else super().uselessness(clock)

    def to_disk(self) -> bool:
        if not self._reserve():
            return False
        event = Event.PARKED
        try:
            park(self.model, to="disk")
            event = Event.ON_DISK
        except (CannotWriteToDisk, NotEnoughMemory) as error:
            log.warning("%s", str(error))
        finally:
            self._end(event)
        return event is Event.ON_DISK

    def let_go(self) -> bool:
        """What somebody else holds as well would take the same RAM after it, so it stays."""
        if not self._reserve():
            return False
        return self.drop(Event.PARKED)

    def _reserve(self) -> bool:
        """Keeps requests from using what is about to go."""
        with self._lock:
            if self.stays:
                return False
            if self.state is State.ON_DISK:  # its RAM is free already
                return False
            self.to(Event.GO if self.state is State.HOME else Event.SPILL)
            return True

    def _end(self, event: Event) -> None:
        with self._lock:
            is_home = self.state is State.GOING and event is Event.PARKED and not self.is_away
            self.to(Event.STAYED if is_home else event)

    # Where it is -----------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        return sum((self.sizes or {}).values())

    @property
    def is_away(self) -> bool:
        """Whether anything of it is not on its device."""
        footprint = self._footprint
        return footprint is not None and (bool(footprint.parked) or not footprint.resident)

    @property
    def lacking(self) -> dict[torch.device, int] | None:
        """Bytes of VRAM that it takes to bring it home, by device; None where nobody knows."""
        if self.model is None or self._footprint is None:
            return self.sizes
        if self.state in (State.HOME, State.ON_LEASE):
            return {}
        # What others have moved to the CPU is not parked.
        return self._footprint.parked or ({} if self._footprint.resident else self.sizes)

    def to(self, event: Event) -> None:
        """Changes the state; the lock of the pool is held."""
        self.state = after(self.state, event)
        if event is Event.COME:
            for device, nbytes in (self.lacking or {}).items():
                self.taken[device] = self.taken.get(device, 0) + nbytes
        elif not self.state.is_moving and event not in (Event.LEASE, Event.RELEASE):
            self.taken = self._footprint.resident if self._footprint is not None else {}

    def found(self) -> Event:
        """Where it is, for one that rests."""
        footprint = self._footprint
        if footprint is None or not self.is_away:
            return Event.FOUND_HOME
        on_disk = footprint.on_disk
        return Event.FOUND_ON_DISK if on_disk and not footprint.in_ram else Event.FOUND_IN_RAM

    def rests_again(self) -> None:
        """After a move that failed: it is where it is found."""
        with self._lock:
            if self.model is None:
                self.to(Event.LET_GO)
                return
            found = {
                Event.FOUND_HOME: Event.STAYED,
                Event.FOUND_IN_RAM: Event.PARKED,
                Event.FOUND_ON_DISK: Event.ON_DISK,
            }
            self.to(found[self.found()])

    # What is done with it ----------------------------------------------------------------------

    def take(self, model: Any, seconds: float) -> None:
        """A model was loaded.

        Raises:
            QMoveError: it has nothing that qmove could move.
        """
        footprint = Footprint(inventory(model))
        sizes = footprint.resident
        for device, nbytes in footprint.parked.items():
            sizes[device] = sizes.get(device, 0) + nbytes
        if not sizes:
            raise QMoveError(
                f"The loader of {self.name!r} gave a {type(model).__name__} that has nothing on an "
                "accelerator. It must return the model itself."
            )
        self.model, self._footprint, self.sizes = model, footprint, sizes
        self.home = max(sizes, key=lambda device: sizes[device])
        self._pin = pins.Pin(model, thread=None, lease=self._holder)
        self._pin.note_modules()
        if not self._says_seconds:
            self.seconds = seconds
        self.loads += 1

    def refresh(self) -> None:
        """Looks again at what the model holds: something may have come into it."""
        if self.model is not None:
            self._footprint = Footprint(inventory(self.model))

    def hold(self) -> None:
        """Keeps everybody from moving it; the lock of moves is held."""
        if self._pin is not None:
            pins.lend(self._pin)

    def release(self) -> None:
        if self._pin is not None:
            pins.take_back(self._pin)

    @property
    def resident(self) -> dict[torch.device, int]:
        """Its bytes that are on accelerators now."""
        return self._footprint.resident if self._footprint is not None else {}

    def about(self) -> dict[str, Any]:
        """For people, as plain data."""
        return {
            "state": self.state.value,
            "nbytes": self.nbytes,
            "vram": {str(device): nbytes for device, nbytes in self.resident.items()},
            "ram": self.bytes_in_ram()[self.key],
            "disk": self.bytes_on_disk()[self.key],
            "leases": len(self.leases),
            "loads": self.loads,
            "wakes": self.wakes,
            "load_seconds": self.seconds,
            "wake_seconds": self.wake_seconds,
            "pinned": self.pinned,
        }

    def forget(self) -> None:
        """Lets go of a model that rests, for good."""
        if self.state is not State.NOT_LOADED:
            self.to(Event.LET_GO)
        self.model = self._footprint = self._pin = None
        self.taken = {}

    def mirrored(self) -> int:
        return self._footprint.mirrored if self._footprint is not None else 0

    def drop(self, otherwise: Event | None = None) -> bool:
        """Lets go of the model, of which somebody has reserved the state. Returns whether it is
        gone; where others still hold it, it stays in the pool, and is `otherwise` then (None: it is
        still reserved)."""
        alive, footprint = Weakly(self.model), self._footprint
        self.model = self._footprint = None
        pin, self._pin = self._pin, None
        if alive() is not None:
            gc.collect()
        left = alive()
        if left is not None:
            self.model, self._footprint, self._pin = left, footprint, pin
            log.debug("%s is held by others: letting go of it would free nothing", self.name)
            if otherwise is not None:
                self._end(otherwise)
            return False
        self._end(Event.LET_GO)
        return True
