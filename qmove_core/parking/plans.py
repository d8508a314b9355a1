"""Plans of moves: what goes where, what is in the way, and what is done at the commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from .. import devices, homes
from ..actions import Action
from ..devices import Device, DeviceMap
from ..errors import (
    CannotMove,
    LiveAutogradGraph,
    MetaTensorsPresent,
    NoTensors,
    counted,
    readable_bytes,
)
from ..homes import Origin
from ..integrations import accelerate_dispatch, diffusers_offload
from ..model import kinds, live_graph
from ..model.holdings import Holding, Inventory
from ..model.inventory import inventory
from ..transfer.moves import MovePlan, StorageMove
from . import layer_order, sleeping, streaming
from .records import Record, record_of


def to_park(
    model: object,
    wake: Callable[[object], object],
    extra: Iterable[object] = (),
    *,
    allow_live_graph: bool = False,
) -> MovePlan:
    """What parking `model` takes: no move if it is parked already.

    Args:
        wake: brings home the model it is given. Called when the parked model is used.
    """
    before = record_of(model)
    extra = tuple(extra)
    held = _inventory_of(model, extra)
    action = Action("park", model)
    away = [
        holding
        for holding in layer_order.holdings_in_order(held)
        if holding.device.type != "cpu" and not _is_emptied(holding)
    ]
    if not away:
        return MovePlan(action, held, [], lambda: None)
    accelerate_dispatch.refuse_lost(action, held)
    _refuse_immovable(action, held, devices.CPU)
    if not allow_live_graph:
        _refuse_live_graph(action, held)
    home_of = {name: holding.device for holding in away for name in holding.names}
    if before is not None:  # parked already, and something has come onto a device since
        home_of, extra = before.homes | home_of, (*before.extra, *extra)
    record = Record(model, extra, home_of)
    moves = [
        StorageMove(holding, devices.CPU, Origin(holding.device, holding.nbytes, record))
        for holding in away
    ]
    return MovePlan(action, held, moves, lambda: _fall_asleep(record, held, wake))


def to_restore(model: object, device: Device | DeviceMap | None = None) -> MovePlan:
    """What bringing a parked model home takes, or to where `device` says."""
    choose = _destination(device)
    record = record_of(model)
    held = _inventory_of(model, record.extra if record else ())
    goals = [
        (holding, choose(holding, home))
        for holding in layer_order.holdings_in_order(held)
        if (home := _home(holding, record))
    ]
    return _to_bring(Action("restore", model), held, goals)


def to_move(model: object, device: Device, *, allow_live_graph: bool = False) -> MovePlan:
    """What relocating a model takes, so that it can run on `device`."""
    target = devices.resolve(device)
    record = record_of(model)
    held = _inventory_of(model, record.extra if record else ())
    action = Action("move", model, f"to {target}")
    refuse_meta(action, held)
    _refuse_immovable(action, held, target, kinds.obstacles(held, target))
    goals = [
        (holding, target)
        for holding in layer_order.holdings_in_order(held)
        if (target.type == "cpu" or _goes_along(holding)) and not _is_emptied(holding)
    ]
    if not allow_live_graph and any(holding.device != target for holding, _target in goals):
        _refuse_live_graph(action, held)
    return _to_bring(action, held, goals)


def _to_bring(
    action: Action, held: Inventory, goals: Sequence[tuple[Holding, torch.device]]
) -> MovePlan:
    """Moves holdings to where the model is to run, and wakes it."""
    moves, staying = [], []
    for holding, target in goals:
        origin = homes.origin_of(holding.storage)
        outsiders = origin.outsiders_on(holding.storage) if origin else []
        if holding.device != target:
            to_host = Origin(holding.device, holding.nbytes, None) if target.type == "cpu" else None
            moves.append(StorageMove(holding, target, to_host, outsiders))
        elif origin is not None:
            staying.append(origin)

    def be_home() -> None:
        for origin in staying:
            origin.record = None
        sleeping.wake_up(held.modules.values())

    return MovePlan(action, held, moves, be_home)


def title(model: object) -> str:
    """What a model is called in messages."""
    return type(model).__name__


def sleep_again(
    moves: Sequence[StorageMove], wake: Callable[[object], object]
) -> Callable[[], None]:
    """What parks a model again whose streaming restore failed. It keeps no tensor alive."""
    origins = (homes.origin_of(move.source) for move in moves)
    records = {id(o.record): o.record for o in origins if o is not None}

    def fall_asleep() -> None:
        for record in records.values():
            model = record.model if isinstance(record, Record) else None
            if isinstance(record, Record) and model is not None:
                again = inventory(model, extra=record.extra)
                kinds.refresh(again)
                _fall_asleep(record, again, wake)

    return fall_asleep


def _fall_asleep(record: Record, held: Inventory, wake: Callable[[object], object]) -> None:
    record.register()
    sleeping.put_to_sleep(held.modules.values(), _WakeModel(record, wake))


class _WakeModel:
    """What a sleeping module of a parked model does when it is used."""

    __slots__ = ("_record", "_wake")

    def __init__(self, record: Record, wake: Callable[[object], object]) -> None:
        self._record, self._wake = record, wake

    def __call__(self, module: nn.Module) -> None:
        model = self._record.model
        if model is not None:
            self._wake(model)
        # A module that outlived the pipeline it was parked with, or was taken out of it.
        if sleeping.sleeps_by(module, self):
            self._wake(module)


def _inventory_of(model: object, extra: Iterable[object]) -> Inventory:
    held = inventory(model, extra=extra)
    streaming.wait_for(holding.storage for holding in held.holdings)
    if not held.holdings and not held.meta:
        hint = (
            f" It refers to modules that are not its own: {', '.join(held.foreign[:5])}; pass "
            "those."
            if held.foreign
            else ""
        )
        raise NoTensors(
            f"{title(model)} holds no tensor that qmove could find. Pass the model itself.{hint}"
        )
    return held


def refuse_meta(action: Action, held: Inventory) -> None:
    """Raises MetaTensorsPresent if some of the model's data is not in memory."""
    diffusers_offload.refuse_absent(action, held.modules.values())
    if held.meta:
        accelerate_dispatch.refuse_lost(action, held)
        raise MetaTensorsPresent(
            action,
            f"a dispatch keeps the data of {counted(len(held.meta), 'tensor')} elsewhere, "
            f"the first is {held.meta[0].name!r}",
            "Call qmove.materialize_meta_tensors(model) first.",
        )


def _refuse_immovable(
    action: Action, held: Inventory, target: torch.device, obstacles: Sequence[tuple[str, str]] = ()
) -> None:
    reasons = [
        *obstacles,
        *((item.name, item.reason) for item in held.immovable if item.device != target),
        *(
            (holding.name, f"its storage was cut to {readable_bytes(holding.nbytes)}")
            for holding in held.holdings
            if holding.device != target and holding.nbytes and holding.lacks_bytes
        ),
    ]
    if reasons:
        raise CannotMove(action, reasons)


def _refuse_live_graph(action: Action, held: Inventory) -> None:
    names = live_graph.tensors_in_live_graph(held)
    if names:
        raise LiveAutogradGraph(action, names)


def _destination(
    device: Device | DeviceMap | None,
) -> Callable[[Holding, torch.device], torch.device]:
    """What `restore(device=...)` means for a holding with a given home."""
    if device is None:
        return lambda holding, home: home
    place = devices.placement(device)
    return lambda holding, home: place(holding.name) or home


def _home(holding: Holding, record: Record | None) -> torch.device | None:
    """The home of a parked holding, None for one that is not parked."""
    if holding.device.type != "cpu":
        return None
    origin = homes.origin_of(holding.storage)
    if origin is not None:
        return origin.home if origin.record is not None else None
    # A tensor that was replaced while the model was parked goes to the home of its name.
    by_name = (record.homes.get(name) for name in holding.names) if record is not None else ()
    return next((home for home in by_name if home is not None), None)


def _is_emptied(holding: Holding) -> bool:
    """Whether its owner has taken the bytes away (`storage.resize_(0)`): nothing is to move."""
    return holding.nbytes == 0 and holding.lacks_bytes


def _goes_along(holding: Holding) -> bool:
    """Whether a move to an accelerator includes a holding.

    What pipelines and hooks keep on the host on purpose stays there.
    """
    on_purpose = holding.kind in ("attribute", "captured") and holding.device.type == "cpu"
    return not on_purpose or homes.origin_of(holding.storage) is not None
