"""A freshly loaded model that lies on the host is parked there, with a home that it never saw."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from .. import devices, homes
from ..actions import Action
from ..homes import Origin
from ..interrupts import interrupts_deferred
from ..memory import arena, budget
from ..memory.blocks import place_of
from ..memory.mapped_files import MappedFile
from ..model import kinds
from ..model.holdings import Holding, Inventory
from ..model.inventory import inventory
from ..moving import moving
from ..storages import as_bytes, rebind
from ..transfer.moves import MovePlan, StorageMove
from ..transfer.transaction import carry_out
from . import plans
from .records import Record
from .requests import Parked, parked_result, wake

BATCH = 64 << 20  # bytes that are in the arena and beside it at a time
_READERS = 4  # threads that read what lies in files, for its checksum
_STAYS = ("state", "captured", "attribute")  # what a device map does not place either


@moving()
def to_host(things: object) -> None:
    """Moves what `things` have on accelerators into the arena, where `adopt` finds it."""
    held = inventory(things)
    away = [holding for holding in held.holdings if holding.device.type != "cpu"]
    moves = [StorageMove(h, devices.CPU, Origin(h.device, h.nbytes, None)) for h in away]
    carry_out(MovePlan(Action("park", things), held, moves, lambda: None))


@moving()
def adopt(
    model: object, home: torch.device, *, stays: bool, seconds: Callable[[], float]
) -> Parked:
    """Parks a model that lies on the host and is nobody else's, as if it came from `home`.

    What lies in a mapped file stays there; everything else goes into the arena, a piece at a time.

    Args:
        stays: it waits there: what lies in files is read once, so that a later change of them is
            seen. Otherwise it is restored next, which reads it.
        seconds: how long the loading has taken, for the report.

    Raises:
        NotEnoughMemory: RAM has no room for it.
        MappedFileChanged: a file was cut short meanwhile.
    """
    action = Action("park", model)
    held = inventory(model)
    parked = [
        holding
        for holding in held.holdings
        if holding.device.type == "cpu" and holding.kind not in _STAYS
    ]
    _into_arena(action, [holding for holding in parked if place_of(holding.storage) is None])
    _note_files(parked, now=stays)
    with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
        plan = _sleep(model, action, held, parked, home)
    done = carry_out(MovePlan(action, held, [], lambda: None))
    return parked_result(model, plan, done, seconds())


def _into_arena(action: Action, outside: list[Holding]) -> None:
    while outside:
        batch: list[Holding] = []
        while outside and sum(holding.nbytes for holding in batch) < BATCH:
            batch.append(outside.pop())
        wanted = [(holding.nbytes, devices.CPU) for holding in batch]
        needed = arena.bytes_for([nbytes for nbytes, _cpu in wanted])
        budget.require(action, {devices.CPU: needed})
        places = budget.allocate(action, wanted, "")
        for holding, place in zip(batch, places, strict=True):
            as_bytes(place).copy_(as_bytes(holding.storage))
            rebind(holding.tensors, place)


def _note_files(parked: list[Holding], *, now: bool) -> None:
    def note(holding: Holding) -> None:
        file, start = place_of(holding.storage) or (None, 0)
        if isinstance(file, MappedFile):
            file.note_content(holding.name, start, start + holding.nbytes, now=now)

    with ThreadPoolExecutor(_READERS, "qmove-read") as readers:
        list(readers.map(note, parked))


def _sleep(
    model: object, action: Action, held: Inventory, parked: list[Holding], home: torch.device
) -> MovePlan:
    kinds.refresh(held)
    record = Record(model, (), wake)
    moves = []
    for holding in parked:
        origin = Origin(home, holding.nbytes, record, plans.weakly(holding.tensors))
        known = homes.origin_of(holding.storage)
        if known is not None:
            origin.digest = known.digest
        move = StorageMove(holding, devices.CPU, origin)
        move.came_from = home
        homes.remember(move.source, origin)
        moves.append(move)
    plans.fall_asleep(record, held, moves)
    for move in moves:
        move.drop_storages()
    return MovePlan(action, held, moves, lambda: None)
