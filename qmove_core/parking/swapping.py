"""One model leaves while another comes: both directions of the link at once, without room for both on the device."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import devices, homes, hosting
from ..interrupts import interrupts_deferred
from ..memory import budget
from ..memory.allocation import bytes_by_device
from ..model import kinds
from ..settings import settings
from ..transfer.copies import Load, Progress, Transfer, bytes_of
from ..transfer.transaction import Freight, Relocated, let_go_of
from . import plans
from .plans import Plan
from .requests import Parked, Restored, bring_home, park, parked_result, restore, restored_result

GROUP = 64 << 20  # bytes that go one way before it is the other way's turn


def swap(
    leaving: object, coming: object, *, progress: Progress | None = None
) -> tuple[Parked, Restored]:
    """Parks `leaving` and brings the parked `coming` home, both at once.

    Each device holds no more meanwhile than the larger of what they have there, and 64 MiB. What qmove's host copy of
    `leaving` still holds unchanged is not copied.

    Args:
        leaving, coming: two models, as for `park` and `restore`.
        progress: as for `park`; what it raises stops the swap.

    Returns:
        What `park` and `restore` would have returned.

    Raises:
        As `park` and `restore`. Both models are then where they were; should there be no way back for `leaving` (its room was
        taken, the device fails), it is parked instead, whole, and wakes when it is used.
    """
    started = time.perf_counter()
    with homes.lock:
        out, into = plans.to_park(leaving, bring_home), plans.to_restore(coming)
        if settings.verify or not out.steps or not into.steps or _share(out, into):
            return park(leaving, progress=progress), restore(coming, progress=progress)
        crossing = _Crossing(out, into)
        try:
            crossing.prepare()
            crossing.cross(progress)
            gone, come = crossing.arrive()
        except BaseException:
            crossing.unload()
            restore(leaving)
            raise
        finally:
            crossing.unload()
        devices.release_cached({step.holding.device for step in out.steps})
        hosting.tell_moved()
    seconds = time.perf_counter() - started
    return parked_result(leaving, out, gone, seconds), restored_result(coming, into, come, seconds)


def _share(out: Plan, into: Plan) -> bool:
    """Whether a storage that is to leave belongs to both models."""
    leaving = {id(tensor) for step in out.steps for tensor in step.holding.tensors}
    return any(
        id(tensor) in leaving for holding in into.held.holdings for tensor in holding.tensors
    )


class _Crossing:
    """Two plans that are carried out at once. Until all of it is there the one that comes stays where it is; the other one
    leaves storage by storage, asleep, so that whoever uses it waits for the swap to end.
    """

    def __init__(self, out: Plan, into: Plan) -> None:
        self._out, self._into = out, into
        self._leaving, self._coming = (
            Freight(out.action, out.steps),
            Freight(into.action, into.steps),
        )
        self._still_there = bytes_by_device(
            [(step.holding.nbytes, step.holding.device) for step in out.steps]
        )
        self._wanted = bytes_by_device([(step.holding.nbytes, step.target) for step in into.steps])
        self._most = {
            device: max(self._still_there.get(device, 0), nbytes)
            for device, nbytes in self._wanted.items()
        }
        self._watched: dict[int, StorageWeakRef] = {}

    def prepare(self) -> None:
        """Checks every budget, and puts what leaves to sleep."""
        needed = {
            device: nbytes - self._still_there.get(device, 0)
            for device, nbytes in self._wanted.items()
        }
        budget.require(
            self._into.action, {device: nbytes for device, nbytes in needed.items() if nbytes > 0}
        )
        self._leaving.find_unchanged()
        self._leaving.allocate_on_host()
        with interrupts_deferred():
            self._out.on_commit()

    def cross(self, progress: Progress | None) -> None:
        """Copies both ways; each storage that has been copied out gives up its place on the device at once."""
        with torch.inference_mode(False), torch.no_grad():
            going, coming = self._leaving.loads(), self._coming.loads()
            for index in range(len(self._out.steps)):
                if index not in going:
                    self._leave(index)
            for index, load in going.items():
                load.on_arrival = functools.partial(self._leave, index, load)
            loads = list(_taking_turns(going.values(), coming.values()))
            with (
                let_go_of(coming.values()),
                Transfer(bytes_of(loads), progress, has_room=self._has_room) as transfer,
            ):
                transfer.copy(loads)
            self._leaving.note_arrivals(going)
            self._coming.note_arrivals(coming)
            self._coming.take_digests()

    def arrive(self) -> tuple[Relocated, Relocated]:
        """The one model is home now, and the other one parked."""
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            kinds.refresh(self._out.held)
            self._coming.commit(self._into.held, self._into.on_commit)
            watched = [self._watched[index] for index in range(len(self._out.steps))]
            stragglers = self._leaving.take_strangers_along(watched)
        gone = Relocated(self._leaving.copied, stragglers, verified=False)
        return gone, Relocated(self._coming.copied, [], verified=False)

    def unload(self) -> None:
        """Lets go of every storage that is not a model's now."""
        self._leaving.unload()
        self._coming.unload()

    def _leave(self, index: int, load: Load | None = None) -> None:
        """A storage of the model that leaves has been copied, or was unchanged: its place is free."""
        step = self._out.steps[index]
        if load is not None:
            assert load.target is not None
            load.source = load.target  # the load must not keep the old one,
            load.on_arrival = None  # nor itself, in a circle
        self._watched[index] = self._leaving.commit_one(index)
        if self._watched[index].expired():
            self._still_there[step.holding.device] -= step.holding.nbytes

    def _has_room(self, device: torch.device, nbytes: int, to_come: int) -> bool:
        """Whether `nbytes` more of the model that comes may be on `device` already; `to_come` of it are not."""
        present = self._still_there.get(device, 0) + self._wanted[device] - to_come
        return present + nbytes <= self._most[device]


def _taking_turns(going: Iterable[Load], coming: Iterable[Load]) -> Iterator[Load]:
    """Both in their order, GROUP bytes of the one after GROUP bytes of the other."""
    ways = [iter(going), iter(coming)]
    while ways:
        for way in list(ways):
            nbytes = 0
            for load in way:
                yield load
                nbytes += load.nbytes
                if nbytes >= GROUP:
                    break
            else:
                ways.remove(way)
