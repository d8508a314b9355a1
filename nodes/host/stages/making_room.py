"""VRAM on demand: parks the least useful models until so much is free, and says what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import qmove_core as qmove
from qmove_core.for_hosts import readable_bytes

from .. import comfy, meter
from ..models import holders, names, residency
from ..models.adopted import Adopted
from ..words import say
from . import auto_parking, executor, waiting


class LessIsFree(qmove.QMoveError):
    """Less VRAM is free than was asked for. What could be parked is parked."""


@dataclass(frozen=True)
class Room:
    """What came of a request for VRAM.

    Attributes:
        report: a line for each device, for people.
        asked: bytes that should be free on each device.
        freed: by device, how many bytes more are free than before.
        free: by device, how many bytes are free now.
    """

    report: str
    asked: int
    freed: dict[torch.device, int]
    free: dict[torch.device, int]

    @property
    def is_enough(self) -> bool:
        """Whether each device has as much free as was asked for."""
        return all(free >= self.asked for free in self.free.values())


def free(nbytes: int, device: str | None = None, *, wait: bool = False) -> Room:
    """Parks models, the least useful first, until `nbytes` are free on `device`, or on each one.

    Where that is not enough, and with `wait`, it waits until other programs have freed the rest.
    """
    order = auto_parking.order_to_park(
        executor.running_graph(), comfy.running_node(), auto_parking.NodeInputs()
    )
    lines: list[str] = []
    freed: dict[torch.device, int] = {}
    now: dict[torch.device, int] = {}
    for target in [torch.device(device)] if device else meter.devices():
        before = meter.free_bytes(target) or 0
        there = [model for model in order if auto_parking.is_on(model, target)]
        residency.have_dynamic_yield(target, nbytes)
        parked = residency.park_until_free(there, target, nbytes)
        if wait and (meter.free_bytes(target) or 0) < nbytes:
            lines += waiting.wait_for_others(target, nbytes)
        now[target] = meter.free_bytes(target) or 0
        freed[target] = max(0, now[target] - before)
        lines += _report(target, now[target], nbytes, [name_of(model) for model in parked])
    report = "\n".join(lines) or say("This machine has no accelerator: there is no VRAM to free.")
    return Room(report, nbytes, freed, now)


def or_fail(make_room: Callable[[], Room]) -> Callable[[], str]:
    """The same, for one who wants nothing less; it returns the report.

    Raises:
        LessIsFree: with the report, where less is free afterwards.
    """

    def make_enough_room() -> str:
        room = make_room()
        if not room.is_enough:
            raise LessIsFree(room.report)
        return room.report

    return make_enough_room


def _report(device: torch.device, free: int, asked: int, parked: list[str]) -> list[str]:
    line = (
        say(
            "{device}: {size} are free, parked {names}.",
            device=device,
            size=readable_bytes(free),
            names=", ".join(parked),
        )
        if parked
        else say(
            "{device}: {size} are free, parked nothing.", device=device, size=readable_bytes(free)
        )
    )
    if free >= asked:
        return [line]
    less = say(
        "That is less than the {size} asked for: no model is left to park.",
        size=readable_bytes(asked),
    )
    return [f"{line} {less}", *holders.pinned_on(device)]


def name_of(model: residency.Model) -> str:
    return model.name if isinstance(model, Adopted) else names.of(model.model)
