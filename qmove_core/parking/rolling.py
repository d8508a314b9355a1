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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import devices, homes
from ..actions import Action
from ..errors import CannotMove, InUse, QMoveError
from ..homes import Origin
from ..interrupts import all_or_nothing, interrupts_deferred
from ..memory import budget, mirrors
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
from .rolling_choice import Limit, Sizes, choose, groups_at_home, sizes_of
from .rolling_units import Unit, is_arriving, is_home, is_parked, storage, storage_of

log = logging.getLogger("qmove")

_running: list[Rolling] = []


def of(held: Inventory) -> Rolling | None:
    """The rolling model that has a storage of this one."""
    mine = {id(tensor) for holding in held.holdings for tensor in holding.tensors}
    return next((rolling for rolling in _running if rolling.has_any(mine)), None)


def takes(used: object) -> bool:
    """Whether a model, or a list of tensors, that is used is one that rolls; then it can be used
    now."""
    return any([rolling.takes(used) for rolling in list(_running)])


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
        self._room: Sizes = Counter()  # bytes that units may take together
        self._units: list[Unit] = []  # in the order of their use
        self._cycle = 0  # how many of them the last forward used
        self._pass: list[Unit] = []  # those that this forward has used

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
            origin = homes.origin_of(storage(holding))
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
        limit = f"in {self._limit} of VRAM" if self._limits else ""
        return Action("stream", self._model, limit)

    @property
    def _limit(self) -> Limit:
        return Limit(min(self._limits.values()))

    # What stays and what comes and goes -----------------------------------------------------------

    def _settle(self) -> tuple[MovePlan, Done]:
        """Divides the model, and brings each part of it to where it belongs."""
        for unit in self._units:
            self._give_back(unit)
        plan = plans.to_restore(self._model)
        coming = {
            device: min(nbytes, max(0, self._limit.usable - self._there(plan.held)[device]))
            for device, nbytes in plan.arriving.items()
        }
        if budget.make_room(coming):
            plan = plans.to_restore(self._model)
        before = self._held, self._homes, self._staying, self._room
        try:
            self._divide(plan)
        except BaseException:  # the units are still those of before
            self._held, self._homes, self._staying, self._room = before
            raise
        there = [unit for unit in self._units if any(map(is_home, unit.holdings))]
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
                origin = homes.origin_of(storage(holding))
                if origin is not None and origin.is_parked:
                    origin.record = self._record
            if any(map(is_parked, unit.holdings)):
                plans.fall_asleep(self._record, unit.held, (), unit)

    def _divide(self, plan: MovePlan) -> None:
        """Raises:
        NotEnoughMemory: a unit, with what must stay, is larger than the limit.
        CannotMove: a module is compiled, and uses its weights where nobody sees it.
        """
        held, goals = plan.held, {id(move.holding): move.device for move in plan.moves}
        places = {id(h): goals.get(id(h), h.device) for h in held.holdings}
        at_home = {key: place for key, place in places.items() if place.type != "cpu"}
        self._held, self._homes = held, at_home
        groups = groups_at_home(held, at_home, self._limit)
        must = [group for group in groups if self._must_stay(group)]
        staying = choose(self._action, groups, must, at_home, self._limit)
        self._staying = {id(holding) for group in staying for holding in group.holdings}
        rolling = [g for g in groups if any(id(h) not in self._staying for h in g.holdings)]
        compiled = [name for name, m in held.modules.items() if streaming.is_compiled(m)]
        if rolling and compiled:
            reason = "it is compiled, and uses its weights where qmove does not see it"
            raise CannotMove(self._action, [(name or "the model", reason) for name in compiled])
        stay = self._sizes(h for h in held.holdings if id(h) in self._staying)
        self._room = Counter(
            {device: self._limit.usable - stay[device] for device in at_home.values()}
        )
        self._units = [self._unit_of(group) for group in rolling]
        self._cycle, self._pass = len(self._units), []

    def _unit_of(self, group: LayerGroup) -> Unit:
        holdings = [h for h in group.holdings if id(h) not in self._staying]
        names = {id(module) for module in group.modules}
        modules = {name: m for name, m in self._held.modules.items() if id(m) in names}
        wrappers = [
            (name, outer)
            for name, outer in self._held.wrappers
            if name.rpartition(".")[0] in modules
        ]
        held = Inventory(holdings, wrappers=wrappers, modules=modules)
        return Unit(self.use, group, holdings, held)

    def _must_stay(self, group: LayerGroup) -> bool:
        """Whether nobody would see the use of it, or something keeps it where it is."""
        pinned = pins.by_storage()
        return not group.modules or any(
            storage(holding)._cdata in pinned
            or storage(holding)._cdata in self._held.addressed
            or not all(allows_looking_after(type(tensor)) for tensor in holding.tensors)
            for holding in group.holdings
        )

    def _sizes(self, holdings: Iterable[Holding]) -> Sizes:
        return sizes_of(holdings, self._homes)

    # A use ----------------------------------------------------------------------------------------

    @moving()
    def use(self, units: Sequence[Unit]) -> None:
        """Returns when these units are home, and those that come next are under way.

        Raises:
            NotEnoughMemory, LiveAutogradGraph: others cannot go for it.
        """
        if self not in _running:
            return
        there = self._there(self._held)
        lacking = self._sizes(h for unit in units for h in unit.holdings if is_parked(h))
        if lacking:
            following, unused = self._after(units)
            for unit in reversed([*following, *unused]):  # the one that is used last first
                if not self._limit.exceeded(there + lacking):
                    break
                if unit.is_there:
                    there -= self._let_go([unit], units)
            for device in self._limit.exceeded(there + lacking):
                raise budget.no_room_within(
                    self._action, device, lacking[device], self._limit.usable - there[device]
                )
            self._bring(units)
            there += lacking
        streaming.wait_for(storage(h) for unit in units for h in unit.holdings if is_arriving(h))
        for unit in units:
            sleeping.wake_up(m for m in unit.modules if sleeping.sleeps_by(m, unit))
            kinds.refresh(unit.held)
            self._keep(unit)
            self._note_use(unit)
        self._bring_next(units, there)

    def _note_use(self, unit: Unit) -> None:
        """Notes the order of use, in which the next forward will need them."""
        layer_order.note_use(unit.modules[0])
        if unit in self._pass:
            self._units = [*self._pass, *(u for u in self._units if u not in self._pass)]
            self._cycle, self._pass = len(self._pass), []
        self._pass.append(unit)

    def _bring_next(self, units: Sequence[Unit], there: Sizes) -> None:
        """Begins to bring what is used next, a batch at a time: where more than half of the room
        for units has been used, or no more than one of them is still to be. What hinders that is
        raised when it is used."""
        following, unused = self._after(units)
        ahead, in_time = self._sizes(h for unit in units for h in unit.holdings), 0
        coming: list[Unit] = []
        going: list[Unit] = []
        staying = list(units)
        for index, unit in enumerate(following):
            lacking = self._sizes(h for h in unit.holdings if is_parked(h))
            if unit in going:
                break
            if not lacking:
                staying.append(unit)
                ahead.update(self._sizes(unit.holdings))
                in_time += not coming
                continue
            if in_time > 1 and any(ahead[d] > self._room[d] // 2 for d in lacking) and not coming:
                break
            later = [*following[index + 1 :], *unused]
            freed = self._to_free(there, [*coming, unit], [*going], later, [*staying, unit])
            if freed is None:
                break
            staying.append(unit)
            coming.append(unit)
            going = freed
        if not coming:
            return
        try:
            if streaming.can_stream(self._plan_to_bring(coming)):
                if going:
                    self._let_go(going, staying)
                self._bring(coming)
        except QMoveError as error:
            log.debug("nothing comes ahead of its use: %s", str(error))

    def _to_free(
        self,
        there: Sizes,
        coming: Sequence[Unit],
        going: list[Unit],
        later: Sequence[Unit],
        staying: Sequence[Unit],
    ) -> list[Unit] | None:
        """The units that go for those that come: beside `going` as many as it takes of those that
        are used later, the last one first. None where that is not enough."""
        needed = there + self._sizes(h for u in coming for h in u.holdings if is_parked(h))
        candidates = [u for u in later if u.is_there and not u.waits and u not in going]
        while True:
            leaving = self._sizes(self._leaving(going, staying).values())
            if not self._limit.exceeded(needed - leaving):
                return going
            if not candidates:
                return None
            going.append(candidates.pop())

    def _after(self, units: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
        """The other units, the one that is used next first; and those that are not."""
        last = self._units.index(units[-1])
        cycle, unused = self._units[: self._cycle], self._units[self._cycle :]
        if last >= self._cycle:  # another part of the model than in the forward before
            cycle, unused = self._units[last:], [*self._units[:last]]
            last = 0
        following = [*cycle[last + 1 :], *cycle[:last]]
        return [u for u in following if u not in units], [u for u in unused if u not in units]

    def _let_go(self, units: Sequence[Unit], but: Sequence[Unit], *, tight: bool = True) -> Sizes:
        """Parks what these units alone need. Returns the bytes that it frees.

        Args:
            but: units that stay.
            tight: as for `carry_out`.
        """
        streaming.wait_for(storage(h) for unit in units for h in unit.holdings)
        leaving = self._leaving(units, but)
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

    def _leaving(self, units: Sequence[Unit], but: Sequence[Unit]) -> dict[int, Holding]:
        """What is home of units and of no other one that stays, by `id`."""
        staying = {id(holding) for unit in but for holding in unit.holdings}
        return {
            id(h): h for unit in units for h in unit.holdings if is_home(h) and id(h) not in staying
        }

    def _to_host(self, holding: Holding) -> StorageMove:
        here = replace(holding, device=self._homes[id(holding)])
        tensors = plans.weakly(holding.tensors)
        return StorageMove(
            here, devices.CPU, Origin(here.device, holding.nbytes, self._record, tensors)
        )

    def _fall_asleep(self, moves: Sequence[StorageMove]) -> None:
        """Every unit that lacks something sleeps, also one that shares it with those that went."""
        for unit in self._units:
            if any(map(is_parked, unit.holdings)):
                ids = {id(tensor) for holding in unit.holdings for tensor in holding.tensors}
                own = [move for move in moves if id(move.holding.tensors[0]) in ids]
                plans.fall_asleep(self._record, unit.held, own, unit)

    def _bring(self, units: Sequence[Unit]) -> None:
        """Begins to bring what is parked of units; where that cannot stream it is there then."""
        plan = self._plan_to_bring(units)
        if streaming.can_stream(plan):
            streaming.restore_streaming(plan, lambda: self._fall_asleep(()), rolls=True)
        else:
            carry_out(plan, tight=True)

    def _plan_to_bring(self, units: Sequence[Unit]) -> MovePlan:
        coming = {id(h): h for unit in units for h in unit.holdings if is_parked(h)}
        moves = []
        for holding in coming.values():
            origin = homes.origin_of(storage(holding))
            known = {id(tensor) for tensor in holding.tensors}
            outsiders = origin.tensors_on(storage(holding), but=known) if origin else []
            here = replace(holding, device=devices.CPU)
            moves.append(StorageMove(here, self._homes[id(holding)], None, outsiders))
        held = self._part(units, coming.values())

        def be_home() -> None:
            for move in moves:
                take_home(move.tensors)
            away_wrappers.take_home(outer for _name, outer in held.wrappers)

        return MovePlan(self._action, held, moves, be_home)

    def _part(self, units: Iterable[Unit], holdings: Iterable[Holding]) -> Inventory:
        modules: dict[str, nn.Module] = {}
        wrappers: list[tuple[str, torch.Tensor]] = []
        for unit in units:
            modules |= unit.held.modules
            wrappers += unit.held.wrappers
        return Inventory(list(holdings), wrappers=wrappers, modules=modules)

    # Host copies ----------------------------------------------------------------------------------

    def _keep(self, unit: Unit) -> None:
        """Nothing gives up the host copies of a unit that is home: it goes back to them."""
        there = [h for h in unit.holdings if is_home(h)]
        found = mirrors.take([storage(h) for h in there])
        unit.kept += [(h, m) for h, m in zip(there, found, strict=True) if m is not None]

    def _give_back(self, unit: Unit, *, keep: bool = True) -> None:
        kept = [(storage(h), mirror) for h, mirror in unit.kept if is_home(h)]
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
        wanted = {storage_of(tensor)._cdata for tensor in tensors}
        units = [u for u in self._units if any(storage(h)._cdata in wanted for h in u.holdings)]
        if not units:
            return False
        found = {storage(h)._cdata for unit in units for h in unit.holdings}
        others = [tensor for tensor in tensors if storage_of(tensor)._cdata not in found]
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
            place = storage(holding)
            origin = homes.origin_of(place)
            if place.device.type != "cpu":
                total[place.device] += place.nbytes()
            elif origin is not None and origin.arrival is not None:
                total[origin.home] += place.nbytes()
        return total

    def _storages(self) -> list[torch.UntypedStorage]:
        return [storage(h) for unit in self._units for h in unit.holdings]
