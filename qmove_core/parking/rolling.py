"""A model that runs in less VRAM than it takes: layers come ahead of their use and go after it.

Its layer groups (`layer_order.py`) are divided once. Those that stay are home, awake and without a
hook. The others, its *units*, come and go with the copies of a streaming restore and of a park; in
between each is home, parked or arriving as any other storage, and nothing is noted of that: its
storages tell. A unit is asleep unless it is home. Its first use

- brings it, or waits for it if it is under way, and lets others go where there is too little room;
- begins to bring those that are used next. For one of them another may go that is used later.

What goes out is compared with the host copy that it came from, by digests: unchanged bytes are not
copied.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import devices, homes
from ..actions import Action
from ..errors import CannotMove, InUse, NotEnoughMemory, QMoveError, readable_bytes
from ..homes import Origin
from ..interrupts import all_or_nothing, interrupts_deferred
from ..memory import budget, mirrors
from ..memory.mirrors import Mirror
from ..model import kinds
from ..model.holdings import Holding, Inventory
from ..moving import moving
from ..settings import settings
from ..transfer.moves import Done, MovePlan, StorageMove
from ..transfer.transaction import carry_out
from . import away_wrappers, in_use, layer_order, pins, plans, sleeping, streaming
from .away_tensors import allows_looking_after, take_home
from .layer_order import LayerGroup
from .records import Record

log = logging.getLogger("qmove")

RESERVE = 4 << 20  # bytes of a limit that are for digests and staging, at most a sixteenth of it

Sizes = Counter[torch.device]

_running: list[Rolling] = []


def of(held: Inventory) -> Rolling | None:
    """The rolling model that has a storage of this one."""
    mine = {id(tensor) for holding in held.holdings for tensor in holding.tensors}
    return next((rolling for rolling in _running if rolling.has_any(mine)), None)


def takes(used: object) -> bool:
    """Whether a model, or a list of tensors, that is used is one that rolls; then it can be used
    now."""
    return any([rolling.takes(used) for rolling in list(_running)])


class _Unit:
    """A layer group that comes and goes. It is what wakes its modules."""

    gives_way = False

    def __init__(
        self, rolling: Rolling, group: LayerGroup, holdings: Sequence[Holding], held: Inventory
    ) -> None:
        self._rolling, self.name = rolling, group.name
        self.modules, self.holdings = group.modules, holdings
        self.held = held
        self.kept: list[tuple[Holding, Mirror]] = []  # host copies that must not be given up

    @property
    def waits(self) -> bool:
        """Whether its tensors are under way."""
        return any(map(_is_arriving, self.holdings))

    def __call__(self, module: nn.Module) -> None:
        self._rolling.use([self])

    @property
    def is_there(self) -> bool:
        """Whether any of it takes VRAM."""
        return any(_is_home(h) or _is_arriving(h) for h in self.holdings)


class Rolling:
    """One model inside of bodies of `resident(model, at_most=...)`. The smallest limit holds.

    Args:
        extra: what was parked with it.
        wake: brings home what is no part of a unit.
    """

    def __init__(self, model: object, extra: Iterable[object], wake: Callable[..., object]) -> None:
        self._model, self._extra, self._plain_wake = model, list(extra), wake
        self._record = Record(model, self._extra, self._wake)
        self._limits: dict[int, int] = {}  # by `id` of the pin of the body
        self._held = Inventory([])
        self._homes: dict[int, torch.device] = {}  # of each holding, by `id`
        self._staying: set[int] = set()  # holdings, by `id`
        self._units: list[_Unit] = []  # in the order of their use
        self._cycle = 0  # how many of them the last forward used
        self._pass: list[_Unit] = []  # those that this forward has used

    # Limits ---------------------------------------------------------------------------------------

    @moving()
    def enter(self, pin: pins.Pin, at_most: int | None) -> tuple[MovePlan, Done]:
        """Lets it run with so many bytes of VRAM, on each device; None: as before."""
        if at_most is None:
            return MovePlan(self._action, self._held, [], lambda: None), Done(0, [], False)
        if self not in _running:
            other = pins.held_by_another_thread(plans.to_restore(self._model).held)
            if other is not None and other.thread is not None:
                raise InUse(self._action, other.thread.name, "keeps it home (qmove.resident)")
            _running.append(self)
        self._limits[id(pin)] = at_most
        return self._settle()

    @moving()
    def leave(self, pin: pins.Pin) -> bool:
        """Ends what `enter` began, unless that was done. Returns whether it rolls no more."""
        self._limits.pop(id(pin), None)
        if self not in _running or self._limits:
            return False
        with interrupts_deferred():
            streaming.wait_for(self._storages())
            all_or_nothing(self._be_ordinary)
        return True

    def _be_ordinary(self) -> None:
        """What is parked now is parked as by `park`, and all that was noted is forgotten."""
        for unit in self._units:
            self._give_back(unit, keep=settings.keep_mirrors)
        record, is_parked = Record(self._model, self._extra, self._plain_wake), False
        for holding in self._held.holdings:
            origin = homes.origin_of(_storage(holding))
            if origin is not None and origin.is_parked:
                is_parked = True
                if origin.record is self._record:
                    origin.record = record
        for unit in self._units:
            sleeping.wake_up(m for m in unit.modules if sleeping.sleeps_by(m, unit))
        if is_parked and self._units:
            plans.fall_asleep(record, self._held, ())
        if self in _running:
            _running.remove(self)
        devices.release_cached(self._homes.values())
        self._held, self._model, self._extra = Inventory([]), None, []
        self._units, self._pass = [], []

    @property
    def _action(self) -> Action:
        limit = f"in {readable_bytes(min(self._limits.values()))} of VRAM" if self._limits else ""
        return Action("stream", self._model, limit)

    @property
    def _limit(self) -> int:
        at_most = min(self._limits.values())
        return at_most - min(RESERVE, at_most // 16)

    # What stays and what comes and goes -----------------------------------------------------------

    def _settle(self) -> tuple[MovePlan, Done]:
        """Divides the model, and brings each part of it to where it belongs."""
        for unit in self._units:
            self._give_back(unit)
        plan = plans.to_restore(self._model)
        coming = {
            device: min(nbytes, max(0, self._limit - self._there(plan.held)[device]))
            for device, nbytes in plan.arriving.items()
        }
        if budget.make_room(coming):
            plan = plans.to_restore(self._model)
        before = self._held, self._homes, self._staying
        try:
            self._divide(plan)
        except BaseException:  # the units are still those of before
            self._held, self._homes, self._staying = before
            raise
        there = [unit for unit in self._units if any(map(_is_home, unit.holdings))]
        if there:
            self._let_go(there, (), tight=False)
        for holding in plan.held.holdings:  # what lies on the host now is home there
            if holding.device.type == "cpu" and id(holding) not in self._homes:
                homes.settle(holding.storage)
        moves = [move for move in plan.moves if id(move.holding) in self._staying]
        plan = MovePlan(self._action, self._held, moves, lambda: self._begin(moves))
        return plan, carry_out(plan)

    def _begin(self, moves: Sequence[StorageMove]) -> None:
        """Wakes all but the units that are parked, which fall asleep."""
        for move in moves:
            take_home(move.tensors)
        sleeping.wake_up(self._held.modules.values())
        away_wrappers.take_home(outer for _name, outer in self._held.wrappers)
        for unit in self._units:
            for holding in unit.holdings:
                origin = homes.origin_of(_storage(holding))
                if origin is not None and origin.is_parked:
                    origin.record = self._record
            if any(map(_is_parked, unit.holdings)):
                plans.fall_asleep(self._record, unit.held, (), unit)

    def _divide(self, plan: MovePlan) -> None:
        """Raises:
        NotEnoughMemory: a unit, with what must stay, is larger than the limit.
        CannotMove: a module is compiled, and uses its weights where nobody sees it.
        """
        held, goals = plan.held, {id(move.holding): move.device for move in plan.moves}
        places = {id(h): goals.get(id(h), h.device) for h in held.holdings}
        at_home = {key: place for key, place in places.items() if place.type != "cpu"}
        groups = [
            replace(group, holdings=[h for h in group.holdings if id(h) in at_home])
            for group in layer_order.groups_of(held)
        ]
        groups = [group for group in groups if group.holdings]
        self._held, self._homes = held, at_home
        staying = self._choose([g for g in groups if self._must_stay(g)], groups)
        self._staying = {id(holding) for group in staying for holding in group.holdings}
        rolling = [g for g in groups if any(id(h) not in self._staying for h in g.holdings)]
        compiled = [name for name, m in held.modules.items() if streaming.is_compiled(m)]
        if rolling and compiled:
            reason = "it is compiled, and uses its weights where qmove does not see it"
            raise CannotMove(self._action, [(name or "the model", reason) for name in compiled])
        self._units = [self._unit_of(group) for group in rolling]
        self._cycle, self._pass = len(self._units), []

    def _unit_of(self, group: LayerGroup) -> _Unit:
        holdings = [h for h in group.holdings if id(h) not in self._staying]
        names = {id(module) for module in group.modules}
        modules = {name: m for name, m in self._held.modules.items() if id(m) in names}
        wrappers = [
            (name, outer)
            for name, outer in self._held.wrappers
            if name.rpartition(".")[0] in modules
        ]
        held = Inventory(holdings, wrappers=wrappers, modules=modules)
        return _Unit(self, group, holdings, held)

    def _must_stay(self, group: LayerGroup) -> bool:
        """Whether nobody would see the use of it, or something keeps it where it is."""
        pinned = pins.by_storage()
        return not group.modules or any(
            _storage(holding)._cdata in pinned
            or _storage(holding)._cdata in self._held.addressed
            or not all(allows_looking_after(type(tensor)) for tensor in holding.tensors)
            for holding in group.holdings
        )

    def _choose(self, must: list[LayerGroup], groups: list[LayerGroup]) -> list[LayerGroup]:
        """The groups that stay: as many as leave room for the units, two of them at a time, so
        that one comes while the other computes. The small ones outside of all layers first, then
        layers in the order of their use."""
        total = self._sizes(h for group in groups for h in group.holdings)
        if all(nbytes <= min(self._limits.values()) for nbytes in total.values()):
            return groups
        sizes = {id(group): self._sizes(group.holdings) for group in groups}
        fixed = _sum(sizes[id(group)] for group in must)
        others = [group for group in groups if not any(group is other for other in must)]
        at_a_time = 2
        if self._exceeds(fixed + _window([sizes[id(group)] for group in others], 2)):
            at_a_time = 1
            alone = [(fixed + sizes[id(group)], group) for group in others] or [(fixed, groups[0])]
            for needed, group in alone:
                for device in self._exceeds(needed):
                    raise self._too_large(device, needed[device], group)
        chosen = list(must)
        wanted = sorted(
            others,
            key=lambda group: (group.is_layer, 0 if group.is_layer else sizes[id(group)].total()),
        )
        for group in wanted:
            left = [g for g in others if g is not group]
            more = fixed + sizes[id(group)]
            if not self._exceeds(more + _window([sizes[id(g)] for g in left], at_a_time)):
                chosen.append(group)
                others, fixed = left, more
        return chosen

    def _too_large(self, device: torch.device, needed: int, group: LayerGroup) -> NotEnoughMemory:
        return NotEnoughMemory(
            self._action,
            str(device),
            needed,
            self._limit,
            "at_most of qmove.resident, less what digests take",
            f"Its layer {group.name!r} and what must be there with it take so much: raise the "
            "limit.",
        )

    def _sizes(self, holdings: Iterable[Holding]) -> Sizes:
        """Bytes of these holdings, each counted once, by their home."""
        total: Sizes = Counter()
        for holding in {id(holding): holding for holding in holdings}.values():
            total[self._homes[id(holding)]] += holding.nbytes
        return total

    def _exceeds(self, sizes: Sizes) -> list[torch.device]:
        """The devices on which this is more than the limit."""
        return [device for device, nbytes in sizes.items() if nbytes > self._limit]

    # A use ----------------------------------------------------------------------------------------

    @moving()
    def use(self, units: Sequence[_Unit]) -> None:
        """Returns when these units are home, and those that come next are under way.

        Raises:
            NotEnoughMemory, LiveAutogradGraph: others cannot go for it.
        """
        if self not in _running:
            return
        there = self._there(self._held)
        lacking = self._sizes(h for unit in units for h in unit.holdings if _is_parked(h))
        if lacking:
            following, unused = self._after(units)
            for unit in reversed([*following, *unused]):  # the one that is used last first
                if not self._exceeds(there + lacking):
                    break
                if unit.is_there:
                    there -= self._let_go([unit], units)
            for device in self._exceeds(there + lacking):
                raise budget.no_room_within(
                    self._action, device, lacking[device], self._limit - there[device]
                )
            self._bring(units)
            there += lacking
        streaming.wait_for(_storage(h) for unit in units for h in unit.holdings if _is_arriving(h))
        for unit in units:
            sleeping.wake_up(m for m in unit.modules if sleeping.sleeps_by(m, unit))
            kinds.refresh(unit.held)
            self._keep(unit)
            self._note_use(unit)
        self._bring_next(units, there)

    def _note_use(self, unit: _Unit) -> None:
        """Notes the order of use, in which the next forward will need them."""
        layer_order.note_use(unit.modules[0])
        if unit in self._pass:
            self._units = [*self._pass, *(u for u in self._units if u not in self._pass)]
            self._cycle, self._pass = len(self._pass), []
        self._pass.append(unit)

    def _bring_next(self, units: Sequence[_Unit], there: Sizes) -> None:
        """Begins to bring what is used next. What hinders that is raised when it is used."""
        following, unused = self._after(units)
        for index, unit in enumerate(following):
            lacking = self._sizes(h for h in unit.holdings if _is_parked(h))
            if not lacking:
                continue
            ahead = following[: index + 1]
            later = [u for u in (*following[index + 1 :], *unused) if u.is_there and not u.waits]
            try:
                if not streaming.can_stream(self._plan_to_bring([unit])):
                    return
                while self._exceeds(there + lacking) and later:
                    there = there - self._let_go([later.pop()], [*units, *ahead])
                if self._exceeds(there + lacking):
                    return
                self._bring([unit])
            except QMoveError as error:
                log.debug("nothing comes ahead of its use: %s", str(error))
                return
            there = there + lacking

    def _after(self, units: Sequence[_Unit]) -> tuple[list[_Unit], list[_Unit]]:
        """The other units, the one that is used next first; and those that are not."""
        last = self._units.index(units[-1])
        cycle, unused = self._units[: self._cycle], self._units[self._cycle :]
        if last >= self._cycle:  # another part of the model than in the forward before
            cycle, unused = self._units[last:], [*self._units[:last]]
            last = 0
        following = [*cycle[last + 1 :], *cycle[:last]]
        return [u for u in following if u not in units], [u for u in unused if u not in units]

    def _let_go(self, units: Sequence[_Unit], but: Sequence[_Unit], *, tight: bool = True) -> Sizes:
        """Parks what these units alone need. Returns the bytes that it frees.

        Args:
            but: units that stay.
            tight: as for `carry_out`.
        """
        streaming.wait_for(_storage(h) for unit in units for h in unit.holdings)
        staying = {id(holding) for unit in but for holding in unit.holdings}
        leaving = {
            id(h): h
            for unit in units
            for h in unit.holdings
            if _is_home(h) and id(h) not in staying
        }
        for unit in units:
            self._give_back(unit)
        moves = [self._to_host(holding) for holding in leaving.values()]
        held = self._part(units, leaving.values())
        plans.refuse_live_graph(self._action, held)
        plan = MovePlan(
            self._action,
            held,
            moves,
            lambda: self._fall_asleep(moves),
            lambda: plans.look_after_outsiders(moves),
        )
        with in_use.kept_still(plan, heeds_pins=False):
            carry_out(plan, tight=tight)
        return self._sizes(leaving.values())

    def _to_host(self, holding: Holding) -> StorageMove:
        here = replace(holding, device=self._homes[id(holding)])
        tensors = plans.weakly(holding.tensors)
        return StorageMove(
            here, devices.CPU, Origin(here.device, holding.nbytes, self._record, tensors)
        )

    def _fall_asleep(self, moves: Sequence[StorageMove]) -> None:
        """Every unit that lacks something sleeps, also one that shares it with those that went."""
        for unit in self._units:
            if any(map(_is_parked, unit.holdings)):
                ids = {id(tensor) for holding in unit.holdings for tensor in holding.tensors}
                own = [move for move in moves if id(move.holding.tensors[0]) in ids]
                plans.fall_asleep(self._record, unit.held, own, unit)

    def _bring(self, units: Sequence[_Unit]) -> None:
        """Begins to bring what is parked of units; where that cannot stream it is there then."""
        plan = self._plan_to_bring(units)
        if streaming.can_stream(plan):
            streaming.restore_streaming(plan, lambda: self._fall_asleep(()), rolls=True)
        else:
            carry_out(plan, tight=True)

    def _plan_to_bring(self, units: Sequence[_Unit]) -> MovePlan:
        coming = {id(h): h for unit in units for h in unit.holdings if _is_parked(h)}
        moves = []
        for holding in coming.values():
            origin = homes.origin_of(_storage(holding))
            known = {id(tensor) for tensor in holding.tensors}
            outsiders = origin.tensors_on(_storage(holding), but=known) if origin else []
            here = replace(holding, device=devices.CPU)
            moves.append(StorageMove(here, self._homes[id(holding)], None, outsiders))
        held = self._part(units, coming.values())

        def be_home() -> None:
            for move in moves:
                take_home(move.tensors)
            away_wrappers.take_home(outer for _name, outer in held.wrappers)

        return MovePlan(self._action, held, moves, be_home)

    def _part(self, units: Iterable[_Unit], holdings: Iterable[Holding]) -> Inventory:
        modules: dict[str, nn.Module] = {}
        wrappers: list[tuple[str, torch.Tensor]] = []
        for unit in units:
            modules |= unit.held.modules
            wrappers += unit.held.wrappers
        return Inventory(list(holdings), wrappers=wrappers, modules=modules)

    # Host copies ----------------------------------------------------------------------------------

    def _keep(self, unit: _Unit) -> None:
        """Nothing gives up the host copies of a unit that is home: it goes back to them."""
        there = [h for h in unit.holdings if _is_home(h)]
        found = mirrors.take([_storage(h) for h in there])
        unit.kept += [(h, m) for h, m in zip(there, found, strict=True) if m is not None]

    def _give_back(self, unit: _Unit, *, keep: bool = True) -> None:
        kept = [(_storage(h), mirror) for h, mirror in unit.kept if _is_home(h)]
        if keep:
            mirrors.put_back([storage for storage, _ in kept], [mirror for _, mirror in kept])
        unit.kept.clear()

    # Who uses it otherwise ------------------------------------------------------------------------

    def has_any(self, tensors: set[int]) -> bool:
        """Whether one of these tensors (`id`) is in the model."""
        return any(id(t) in tensors for holding in self._held.holdings for t in holding.tensors)

    def has_all(self, held: Inventory) -> bool:
        """Whether all of a model is in this one."""
        own = {id(tensor) for holding in self._held.holdings for tensor in holding.tensors}
        return all(id(t) in own for holding in held.holdings for t in holding.tensors)

    def is_for(self, model: object) -> bool:
        """Whether this is the model, or a part of it."""
        return self._record.is_for(model) or any(m is model for m in self._held.modules.values())

    @moving()
    def takes(self, used: Any) -> bool:
        """See `takes`. Of a model that its owner has parked meanwhile what stays comes home."""
        if self not in _running:
            return False
        if isinstance(used, list) and used and all(isinstance(t, torch.Tensor) for t in used):
            return self._takes_tensors(used)
        if not self.is_for(used):
            return False
        self._settle()
        units = [u for u in self._units if any(m is used for m in u.modules)]
        if units:
            self.use(units)
        return True

    def _takes_tensors(self, tensors: Sequence[torch.Tensor]) -> bool:
        wanted = {_storage_of(tensor)._cdata for tensor in tensors}
        units = [u for u in self._units if any(_storage(h)._cdata in wanted for h in u.holdings)]
        if not units:
            return False
        found = {_storage(h)._cdata for unit in units for h in unit.holdings}
        others = [tensor for tensor in tensors if _storage_of(tensor)._cdata not in found]
        self.use(units)
        if others:
            self._plain_wake(others, stream=False)
        return True

    def _wake(self, used: object, *, stream: bool) -> None:
        if not self.takes(used):
            self._plain_wake(used, stream=stream)

    def _there(self, held: Inventory) -> Sizes:
        """Bytes of the model that take VRAM now, or will."""
        total: Sizes = Counter()
        for holding in held.holdings:
            storage = _storage(holding)
            origin = homes.origin_of(storage)
            if storage.device.type != "cpu":
                total[storage.device] += storage.nbytes()
            elif origin is not None and origin.arrival is not None:
                total[origin.home] += storage.nbytes()
        return total

    def _storages(self) -> list[torch.UntypedStorage]:
        return [_storage(h) for unit in self._units for h in unit.holdings]


def _window(sizes: Sequence[Sizes], count: int) -> Sizes:
    """The most that so many units take on each device that are used one after the other."""
    total: Sizes = Counter()
    for index in range(len(sizes)):
        together = _sum(sizes[(index + k) % len(sizes)] for k in range(min(count, len(sizes))))
        for device, nbytes in together.items():
            total[device] = max(total[device], nbytes)
    return total


def _sum(sizes: Iterable[Mapping[torch.device, int]]) -> Sizes:
    total: Sizes = Counter()
    for one in sizes:
        total.update(one)
    return total


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


def _storage(holding: Holding) -> torch.UntypedStorage:
    """Where the bytes are now, also while they are under way."""
    return _storage_of(holding.tensors[0])


def _is_home(holding: Holding) -> bool:
    return _storage(holding).device.type != "cpu"


def _is_arriving(holding: Holding) -> bool:
    origin = homes.origin_of(_storage(holding))
    return origin is not None and origin.arrival is not None


def _is_parked(holding: Holding) -> bool:
    origin = homes.origin_of(_storage(holding))
    return origin is not None and origin.is_parked
