"""Plans of moves: what goes where, what is in the way, and what is done at the commit."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from .. import devices, homes
from ..actions import Action
from ..collector import collection_deferred
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
from ..memory.blocks import place_of
from ..model import kinds, live_graph
from ..model.holders import Straggler
from ..model.holdings import Holding, Inventory
from ..model.inventory import inventory
from ..transfer.moves import MovePlan, StorageMove
from . import away_wrappers, entrances, layer_order, pins, sleeping, streaming
from .away_tensors import is_looked_after, put_away, take_home
from .records import Record, record_of

_REGISTERED = ("parameter", "buffer", "gradient", "quantization state", "inner tensor")


def to_park(
    model: object,
    wake: Callable[..., object],
    extra: Iterable[object] = (),
    *,
    allow_live_graph: bool = False,
    strict: bool = False,
    free: int | Mapping[Device, int] | None = None,
    goes_along: Callable[[Holding], bool] | None = None,
) -> MovePlan:
    """What parking `model` takes: no move if it is parked already.

    Args:
        free: only so much of it that so many bytes come free; None: all of it.
        goes_along: whether what is parked already goes to another place on the host now.
        strict: refuse what cannot be moved, which otherwise stays where it is.
        wake: brings home the model, or the list of tensors, that it is given; it may stream if
            `stream` is true. Called when the parked model is used.
    """
    wanted = None if free is None else _bytes_to_free(free)
    before = record_of(model)
    extra = tuple(extra)
    action = Action("park", model)
    if goes_along is None:
        everything = _inventory_of(model, extra)
    else:
        known = (*before.extra, *extra) if before is not None else extra
        everything = _inventory_of(model, known, before, comes=True)
    held = pins.without_pinned(action, model, everything)
    away = [
        holding
        for holding in layer_order.holdings_in_order(held)
        if holding.device.type != "cpu"
        and not _is_emptied(holding)
        and holding.storage._cdata not in held.addressed
    ]
    if wanted is not None:
        away = layer_order.last_used(held, away, wanted)
    parked = [
        StorageMove(holding, devices.CPU, origin, _outsiders(origin, holding))
        for holding in (held.holdings if goes_along is not None else ())
        if holding.device.type == "cpu"
        and (origin := homes.origin_of(holding.storage)) is not None
        and origin.is_parked
        and goes_along is not None
        and goes_along(holding)
    ]
    for move in parked:
        move.digest = move.origin.digest if move.origin is not None else None
    if not away and not (strict and held.immovable):
        return MovePlan(action, held, parked, lambda: None)
    accelerate_dispatch.refuse_lost(action, everything)
    _refuse_immovable(action, held, devices.CPU, left_alone=not strict)
    if not allow_live_graph:
        refuse_live_graph(action, held if wanted is None else replace(held, holdings=away))
    if before is not None:  # parked already, and something has come onto a device since
        extra = (*before.extra, *extra)
    record = Record(model, extra, wake)
    with collection_deferred():
        moves = [
            StorageMove(
                holding,
                devices.CPU,
                Origin(holding.device, holding.nbytes, record, weakly(holding.tensors)),
            )
            for holding in away
        ]
    belonging = _Neighbours(held)
    for holding in held.holdings:
        if holding.device.type == "cpu" and belonging.home_of(holding) is None:
            homes.settle(holding.storage)
    return MovePlan(
        action,
        held,
        [*moves, *parked],
        lambda: fall_asleep(record, held, moves),
        lambda: look_after_outsiders(moves),
    )


def _outsiders(origin: Origin, holding: Holding) -> list[torch.Tensor]:
    """The tensors that are known to look into a parked storage and are not in the model."""
    return origin.tensors_on(holding.storage, but={id(tensor) for tensor in holding.tensors})


def to_restore(model: object, device: Device | DeviceMap | None = None) -> MovePlan:
    """What bringing a parked model home takes, or to where `device` says.

    What is pinned to a device goes there.
    """
    choose = _destination(device)
    record = record_of(model)
    held = _inventory_of(model, record.extra if record else (), record, comes=True)
    belonging, pinned = _Neighbours(held), pins.by_storage(with_device=True)

    def goal(holding: Holding, home: torch.device) -> torch.device:
        pin = pinned.get(holding.storage._cdata) if pinned else None
        return pin.device if pin is not None and pin.device else choose(holding, home)

    goals = [
        (holding, goal(holding, home))
        for holding in layer_order.holdings_in_order(held)
        if (home := belonging.home_of(holding))
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
    pins.refuse(action, (holding for holding, _target in goals), target)
    if not allow_live_graph and any(holding.device != target for holding, _target in goals):
        refuse_live_graph(action, held)
    return _to_bring(action, held, goals)


def _to_bring(
    action: Action, held: Inventory, goals: Sequence[tuple[Holding, torch.device]]
) -> MovePlan:
    """Moves holdings to where the model is to run, and wakes it."""
    moves, staying = [], []
    for holding, target in goals:
        storage = holding.storage
        origin = homes.origin_of(storage)
        known = {id(tensor) for tensor in holding.tensors}
        outsiders = origin.tensors_on(storage, but=known) if origin else []
        if holding.device != target or _lies_in_a_file(storage):
            home = holding.device if origin is None or not origin.is_parked else origin.home
            to_host = Origin(home, holding.nbytes, None) if target.type == "cpu" else None
            moves.append(StorageMove(holding, target, to_host, outsiders))
        elif origin is not None:
            staying.append((origin, outsiders))

    def be_home() -> None:
        for origin, outsiders in staying:
            origin.record = None
            take_home(outsiders)
        for move in moves:
            take_home(move.outsiders)
        for holding in held.holdings:  # what was on its way out and stayed is not among the moves
            take_home(holding.tensors)
        away_wrappers.take_home(outer for _name, outer in held.wrappers)
        sleeping.wake_up(held.modules.values())

    return MovePlan(action, held, moves, be_home)


def _lies_in_a_file(storage: torch.UntypedStorage) -> bool:
    """Whether what runs on the host would read a file there, which others may change."""
    place = place_of(storage)
    return place is not None and place[0].is_file


def _add_what_left(held: Inventory, record: Record | None, model: object) -> None:
    """Adds what was parked with the model and is no longer in it.

    It may be put back, where nobody can see it (`parameter.data = kept`), when the model is home.
    """
    known = {holding.storage._cdata for holding in held.holdings}
    for tensors in homes.tensors_of(record, model, known):
        name, dtype = "<outside of the model>", tensors[0].dtype
        holding = Holding(0, devices.CPU, streaming.OUTSIDE, dtype, [name], tensors)
        holding.nbytes = holding.storage.nbytes()
        held.holdings.append(holding)


def _bytes_to_free(free: int | Mapping[Device, int]) -> dict[torch.device | None, int]:
    """Bytes by device, None for all devices together.

    Raises:
        ValueError: a negative number of bytes.
    """
    wanted: dict[torch.device | None, int] = (
        {devices.resolve(device): nbytes for device, nbytes in free.items()}
        if isinstance(free, Mapping)
        else {None: free}
    )
    for nbytes in wanted.values():
        if nbytes < 0:
            raise ValueError(
                f"free is a number of bytes, not {nbytes}; leave it out to park the whole model."
            )
    return wanted


def weakly(tensors: Iterable[torch.Tensor]) -> list[TensorWeakRef]:
    """Refers to tensors without keeping them alive."""
    return [TensorWeakRef(tensor) for tensor in tensors]


def title(model: object) -> str:
    """What a model is called in messages."""
    return type(model).__name__


def sleep_again(moves: Sequence[StorageMove]) -> Callable[[], None]:
    """What parks a model again whose streaming restore failed. It keeps no tensor alive."""
    origins = (homes.origin_of(move.source) for move in moves)
    records = {id(o.record): o.record for o in origins if o is not None}

    def sleep() -> None:
        for record in records.values():
            model = record.model if isinstance(record, Record) else None
            if isinstance(record, Record) and model is not None:
                again = inventory(model, extra=record.extra)
                kinds.refresh(again)
                fall_asleep(record, again, ())

    return sleep


def fall_asleep(
    record: Record,
    held: Inventory,
    moves: Sequence[StorageMove],
    waker: sleeping.Waker | None = None,
) -> None:
    """Lets a model that was just parked wake when it is used.

    Args:
        waker: what its modules call; None: what wakes the model that they are in.
    """
    record.register()
    entrances.guard()
    owners = _Owners(held.modules)
    tops = outermost(held.modules.values())
    wakes_whole = isinstance(record.model, nn.Module) or len(tops) == 1
    leaving = [tensor for move in moves for tensor in move.tensors]
    put_away(leaving)
    away_wrappers.put_away((outer for _name, outer in held.wrappers), leaving)
    noted: set[int] = set()
    for move in moves:
        owner = owners.of(move.holding.name)
        if owner is None:  # nothing else wakes a tensor that does not wake by itself
            wakes_whole = wakes_whole or not all(map(is_looked_after, move.tensors))
        elif id(owner) not in noted:
            noted.add(id(owner))
            if sleeping.home_of(owner) is None:
                sleeping.note_home(owner, move.came_from)
    _note_parts(held, moves, owners, tops)
    ids = {id(module) for module in held.modules.values()}  # not those of a pinned part
    for top in tops:
        own = [module for module in top.modules() if id(module) in ids]
        sleeping.put_to_sleep(own, waker or _WakeModel(record, None if wakes_whole else top))


def _note_parts(
    held: Inventory, moves: Iterable[StorageMove], owners: _Owners, tops: Iterable[nn.Module]
) -> None:
    """Notes in which of the modules each parked storage is: it goes home with each of them."""
    origins = {id(move.holding): move.origin for move in moves}
    inside = {id(module): top for top in tops for module in top.modules()}
    for holding in held.holdings:
        origin = origins.get(id(holding)) or homes.origin_of_tensor(holding.tensors[0])
        if origin is None:
            continue
        found = {id(top): top for name in holding.names if (top := inside.get(id(owners.of(name))))}
        known = {id(part()) for part in origin.parts}
        origin.parts += tuple(weakref.ref(top) for key, top in found.items() if key not in known)


def look_after_outsiders(moves: Iterable[StorageMove]) -> None:
    """Lets the tensors outside of a parked model that moved with it come home by themselves too."""
    for move in moves:
        if move.origin is not None and len(move.origin.tensors) > len(move.holding.tensors):
            put_away(tensor for ref in move.origin.tensors if (tensor := ref()) is not None)


def outermost(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those modules that are in no other of them."""
    modules = list(modules)
    inside = {id(child) for module in modules for child in module.children()}
    return [module for module in modules if id(module) not in inside]


class _WakeModel:
    """What a sleeping module of a parked model does when it is used.

    What wakes is what is used: of a pipeline the model that the module is in.
    """

    __slots__ = ("_record", "_top")
    waits = gives_way = False

    def __init__(self, record: Record, top: nn.Module | None) -> None:
        self._record, self._top = record, None if top is None else weakref.ref(top)

    def __call__(self, module: nn.Module) -> None:
        used = self._record.model if self._top is None else self._top()
        if used is not None:
            self._record.wake(used, stream=True)
        # A module that outlived the model it was parked with, or was taken out of it.
        if sleeping.sleeps_by(module, self):
            self._record.wake(module, stream=True)


class _Owners:
    """Which module a name of an inventory is in."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules

    def of(self, name: str) -> nn.Module | None:
        """The innermost module."""
        return next(self.around(name), None)

    def around(self, name: str) -> Iterator[nn.Module]:
        """The modules around a name, the innermost first."""
        while name:
            name = name.rpartition(".")[0]
            module = self._modules.get(name)
            if module is not None:
                yield module


class _Neighbours:
    """Where the holdings of a model are home."""

    def __init__(self, held: Inventory) -> None:
        self._held = held
        self._owners = _Owners(held.modules)

    def home_of(self, holding: Holding) -> torch.device | None:
        """The home of a holding that is away; None for one that is home.

        What came into a parked model on the host is home where the tensors of its module are, or of
        those around it; unless its owner has sent it to the host.
        """
        if holding.device.type != "cpu":
            return None
        origin = homes.origin_of(holding.storage)
        if origin is not None:
            return origin.home if origin.is_parked else None
        if holding.kind not in _REGISTERED or homes.is_settled(holding.storage):
            return None
        around = list(self._owners.around(holding.name))
        if not any(sleeping.is_parked(module) for module in around):
            return None
        beside = (self._here.get(id(m)) or sleeping.home_of(m) for m in around)
        return next((home for home in beside if home is not None), self._anywhere)

    @functools.cached_property
    def _here(self) -> dict[int, torch.device]:
        """Where the tensors live that modules have, by `id` of the module."""
        found: dict[int, torch.device] = {}
        for holding in self._held.holdings:
            origin = homes.origin_of(holding.storage)
            owner = self._owners.of(holding.name)
            home = origin.home if origin is not None and origin.is_parked else holding.device
            if owner is not None and home.type != "cpu":
                found.setdefault(id(owner), home)
        return found

    @functools.cached_property
    def _anywhere(self) -> torch.device | None:
        everywhere = map(sleeping.home_of, self._held.modules.values())
        return next((home for home in everywhere if home is not None), None)


def _inventory_of(
    model: object, extra: Iterable[object], record: Record | None = None, *, comes: bool = False
) -> Inventory:
    held = inventory(model, extra=extra)
    if comes:
        _add_what_left(held, record, model)
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
    action: Action,
    held: Inventory,
    target: torch.device,
    obstacles: Sequence[tuple[str, str]] = (),
    *,
    left_alone: bool = False,
) -> None:
    """With `left_alone` only what may have the address of anything in the model."""
    reasons = [
        *obstacles,
        *(
            (item.name, item.reason)
            for item in held.immovable
            if item.device is None or (item.device != target and not left_alone)
        ),
        *(
            (holding.name, f"its storage was cut to {readable_bytes(holding.nbytes)}")
            for holding in held.holdings
            if holding.device != target and holding.nbytes and holding.lacks_bytes
        ),
    ]
    if reasons:
        raise CannotMove(action, reasons)


def left_alone(plan: MovePlan) -> list[Straggler]:
    """What a park leaves where it is, since it cannot be moved."""
    return [
        Straggler(item.name, item.device, item.nbytes, (item.reason,))
        for item in plan.held.immovable
        if item.device is not None and item.device.type != "cpu"
    ]


def emptied(plan: MovePlan) -> list[str]:
    """The tensors whose owner, or a stranger, has taken their bytes away."""
    return [holding.name for holding in plan.held.holdings if _is_emptied(holding)]


def refuse_live_graph(action: Action, held: Inventory) -> None:
    """Raises LiveAutogradGraph if a graph still needs one of these."""
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


def _is_emptied(holding: Holding) -> bool:
    """Whether its owner has taken the bytes away (`storage.resize_(0)`): nothing is to move."""
    return holding.nbytes == 0 and holding.lacks_bytes


def _goes_along(holding: Holding) -> bool:
    """Whether a move to an accelerator includes a holding.

    What pipelines and hooks keep on the host on purpose stays there.
    """
    on_purpose = holding.kind in ("attribute", "captured") and holding.device.type == "cpu"
    return not on_purpose or homes.origin_of(holding.storage) is not None
