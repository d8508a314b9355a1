"""A streaming restore: the model can be used at once, and each part of it waits only for its own
bytes.

Until they have arrived
- the modules of a layer group (`layer_order.py`) are asleep: the first use of one waits for the
group;
- the tensors look at the host's bytes, and any other use of one waits for its arrival too
(`away_tensors.py`).
The host waits, so no stream anywhere can be too early; then the tensors look at their new place.
Who can read one without our knowing reads true bytes. Afterwards modules and tensors have their own
classes back. The host's bytes stay until everything is there: a copy that fails leaves the model
parked.

Whoever waits waits for one restore: what waits for a later one is left alone when an earlier one
ends.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from .. import devices, homes, hosting
from ..errors import CapturingGraph, DeviceLost
from ..homes import Origin
from ..interrupts import all_or_nothing, interrupts_deferred
from ..memory import giving_back
from ..model import kinds
from ..model.holdings import Holding, Inventory
from ..moving import moving, ordinary_state
from ..settings import settings
from ..storages import EMPTY, rebind, use_count
from ..transfer.copies import CopyJob, Transfer
from ..transfer.moves import MovePlan, StorageMove
from ..transfer.transaction import MoveTransaction, keep_as_mirrors, unshared
from . import layer_order, sleeping
from .away_tensors import allows_looking_after, put_away, take_home
from .layer_order import LayerGroup

log = logging.getLogger("qmove")

OUTSIDE = (
    "outside of the model"  # the kind of a holding that may be put back unseen: it must be home
)

_under_way: list[StreamingRestore] = []


def can_stream(plan: MovePlan) -> bool:
    """Whether a restore can stream: what uses the weights must do it where Python sees it."""
    held = plan.held
    if settings.verify or held.wrappers or any(map(is_compiled, held.modules.values())):
        return False
    if any(move.holding.kind == OUTSIDE for move in plan.moves) or not _are_waited_for(plan):
        return False
    return all(
        move.came_from.type == "cpu"
        and move.device.type != "cpu"
        and devices.has_streams(move.device)
        for move in plan.moves
    )


def _are_waited_for(plan: MovePlan) -> bool:
    """Whether each tensor can be made to wait, by itself or by its module."""
    classes = {type(tensor) for move in plan.moves for tensor in move.tensors}
    refusing = {cls for cls in classes if not allows_looking_after(cls)}
    return not refusing or not any(
        type(tensor) in refusing
        for group in layer_order.groups_of(plan.held)
        if not group.modules
        for holding in group.holdings
        for tensor in holding.tensors
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether it uses its weights where Python does not see it."""
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)


def restore_streaming(
    plan: MovePlan, sleep_again: Callable[[], None], *, rolls: bool = False
) -> None:
    """Queues the copies of a plan, and lets its tensors wait for them.

    Args:
        sleep_again: puts the model to sleep, should a copy fail on its way.
        rolls: it is a part of a model that goes again soon (`rolling.py`), which wakes it: host
            copies stay whatever the settings say, and memory stays with the allocator.
    """
    arriving = StreamingRestore(plan, sleep_again, rolls=rolls)
    groups = [] if rolls else layer_order.groups_of(plan.held)
    try:
        with MoveTransaction(plan) as transaction:
            transaction.allocate_on_host()
            with Transfer(
                plan.nbytes,
                wait=False,
                digests=rolls or settings.keep_mirrors,
                digests_at_end=rolls,
            ) as transfer:
                transaction.start(transfer, plan.moves)
                with interrupts_deferred():
                    arriving.begin(plan, groups)
    except BaseException:
        if arriving not in _under_way:
            arriving.forget()
        raise
    hosting.tell_moved()


@moving()
def wait_for(storages: Iterable[torch.UntypedStorage] | None = None) -> None:
    """Waits for the restores that bring one of these storages, or for all of them.

    Also ends those whose model is gone.
    """
    if not _under_way:
        return
    wanted = None if storages is None else {storage._cdata for storage in storages}
    for arriving in list(_under_way):
        if wanted is None or arriving.brings(wanted) or arriving.is_abandoned():
            arriving.finish()


class _Part(CopyJob):
    """One storage under way. Its origin has weak references to the tensors that look into it."""

    __slots__ = ("__weakref__", "_finalizers", "came_to", "origin", "was_origin", "was_unshared")

    def __init__(self, arriving: StreamingRestore, move: StorageMove) -> None:
        super().__init__(move.source, move.device)
        self.was_origin = homes.origin_of(move.source)
        record = self.was_origin.record if self.was_origin is not None else None
        self.origin = Origin(
            move.device,
            move.nbytes,
            record,
            [TensorWeakRef(tensor) for tensor in move.tensors],
            arrival=functools.partial(arriving.wait_for, [self]),
        )
        self.was_unshared = False
        self.came_to: int | None = None  # where its tensors look since it is there
        self._finalizers = [weakref.finalize(tensor, self._drop) for tensor in move.tensors]

    def take_over(self, move: StorageMove) -> None:
        """Knows the copy, now that it is queued."""
        self.target, self.arrival, self.read_digest = move.target, move.arrival, move.read_digest

    def let_wait(self, move: StorageMove) -> None:
        """Lets the tensors wait for the copy. Those that allow no subclass are there when their
        module is."""
        self.was_unshared = use_count(self.source) == len(move.tensors) + 1
        homes.remember(self.source, self.origin)
        put_away(move.tensors)

    def be_there(self) -> None:
        """Lets the tensors look at their new place. Its bytes are there."""
        if self.target is not None:
            self.came_to = self.target._cdata
            rebind(self.origin.tensors_on(self.source), self.target)
            take_home(self.there())
            homes.forget(self.source._cdata)

    def there(self) -> list[torch.Tensor]:
        """The tensors that look at their new place."""
        return self.origin.tensors_on(self.target) if self.target is not None else []

    def go_back(self) -> None:
        """Parks the tensors again, wherever they look."""
        if self.source is EMPTY:  # it was done, and all is forgotten
            return
        if self.came_to is not None and self.target is not None:
            rebind(self.there(), self.source)
        if self.was_origin is None:
            homes.forget(self.source._cdata)
            take_home(self.origin.tensors_on(self.source))
        else:
            self.was_origin.tensors = self.origin.tensors
            homes.remember(self.source, self.was_origin)
            put_away(self.was_origin.tensors_on(self.source))

    def is_abandoned(self) -> bool:
        return all(ref() is None for ref in self.origin.tensors)

    def forget(self) -> None:
        """Drops everything; finalizers and the garbage collector may still refer to this object."""
        for finalizer in self._finalizers:
            finalizer.detach()
        self.drop_storages()
        self.was_origin = None
        if hasattr(self, "origin"):
            del self.origin

    def _drop(self) -> None:
        """A tensor is gone. After the last one both storages go, when no copy writes to them."""
        if self.is_abandoned():
            if self.arrival is not None:
                self.arrival.synchronize()
            self.drop_storages()


class StreamingRestore:
    """One restore whose bytes are arriving. It holds the model weakly, and its storages."""

    def __init__(
        self, plan: MovePlan, sleep_again: Callable[[], None], *, rolls: bool = False
    ) -> None:
        self._action, self._rolls = plan.action, rolls
        self._parts = [_Part(self, move) for move in plan.moves]
        self._devices = {move.device for move in plan.moves}
        self._groups: list[_Group] = []
        self._sleep_again = sleep_again

    def begin(self, plan: MovePlan, groups: Sequence[LayerGroup]) -> None:
        """Lets everything wait for the copies, which are queued."""
        all_or_nothing(lambda: self._begin(plan, groups), self._go_back)

    def _begin(self, plan: MovePlan, groups: Sequence[LayerGroup]) -> None:
        part_of = {}
        for part, move in zip(self._parts, plan.moves, strict=True):
            part.take_over(move)
            part_of[id(move.holding)] = part
        plan.on_commit()  # wakes what groups have put to sleep that were begun before
        self._groups.clear()
        for part, move in zip(self._parts, plan.moves, strict=True):
            part.let_wait(move)
        for group in groups:
            parts = [part_of[id(h)] for h in group.holdings if id(h) in part_of]
            is_home = any(h.device.type != "cpu" for h in group.holdings)  # its use is noted
            if (parts or is_home) and group.modules:
                self._groups.append(_Group(self, parts, group.modules))
                sleeping.put_to_sleep(group.modules, self._groups[-1])
        for move in plan.moves:
            move.is_committed = True
        if self not in _under_way:
            _under_way.append(self)

    def brings(self, storages: set[int]) -> bool:
        """Whether one of these storages (`_cdata`) is a part of it."""
        return any(
            part.source._cdata in storages or part.came_to in storages for part in self._parts
        )

    def is_abandoned(self) -> bool:
        """Whether the model is gone."""
        return all(part.is_abandoned() for part in self._parts)

    @moving()
    def wait_for(self, parts: Sequence[_Part]) -> None:
        """Returns when the tensors of these parts are home."""
        if self not in _under_way:
            return
        self._synchronize(parts)
        self._be_there(parts)
        if parts and self._parts[-1] in parts:
            self.finish()

    @moving()
    def finish(self) -> None:
        """Returns when everything is there."""
        if self not in _under_way:
            return
        self._synchronize(self._parts)
        self._be_there(self._parts)
        with interrupts_deferred():
            all_or_nothing(self._end, self.forget)

    def _end(self) -> None:
        if self in _under_way:
            _under_way.remove(self)
        if any(group.is_used for group in self._groups):
            for group in self._groups:  # what was not used by now will be, in the order known
                group.note_use()
        for group in self._groups:
            group.wake()
        alone = zip(self._parts, unshared(self._parts), strict=True)
        there = [p for p, is_alone in alone if is_alone and p.was_unshared and p.target]
        for part in there:
            part.digest = part.read_digest()
        keep_as_mirrors(there, always=self._rolls)
        self.forget()
        if not self._rolls:
            devices.release_cached(self._devices)

    def _be_there(self, parts: Iterable[_Part]) -> None:
        new = [part for part in parts if part.came_to is None]

        def come() -> None:
            for part in new:
                part.be_there()
            _refresh([(part, part.there()) for part in new], ())

        if new:
            with interrupts_deferred():
                all_or_nothing(come, self._park_again)

    def forget(self) -> None:
        """Drops everything, which finalizers of the model's tensors may still refer to."""
        for part in self._parts:
            part.forget()
        self._parts.clear()
        self._groups.clear()

    def _synchronize(self, parts: Sequence[_Part]) -> None:
        waiting = [part for part in parts if part.arrival is not None]
        if waiting and devices.is_capturing():  # it arrives none the less
            raise CapturingGraph(self._action)
        try:
            for part in waiting:
                part.arrival.synchronize()
                part.arrival = None
        except Exception as error:
            lost = devices.lost(error, self._devices)
            self._park_again()
            if lost is not None:
                raise DeviceLost(self._action, str(lost), error) from error
            raise

    def _park_again(self) -> None:
        """A copy failed: the model is parked again, with the bytes it had when it was."""
        with interrupts_deferred():
            all_or_nothing(self._undo)
        log.error("a copy failed on its way: the model is parked again")

    def _undo(self) -> None:
        if self in _under_way:
            _under_way.remove(self)
        self._let_copies_end()
        self._go_back()
        self.forget()

    def _go_back(self) -> None:
        for group in self._groups:
            group.wake()
        for part in self._parts:
            part.go_back()
        self._sleep_again()

    def _let_copies_end(self) -> None:
        """After one of them failed: no memory may be freed below the others."""
        for part in self._parts:
            if part.arrival is not None:
                try:
                    part.arrival.synchronize()
                except Exception as error:
                    log.debug("another copy failed as well: %s", str(error))
                part.arrival = None


class _Group:
    """What wakes the modules of one layer group: the arrival of its parts."""

    waits, gives_way = True, False

    def __init__(
        self, arriving: StreamingRestore, parts: Sequence[_Part], modules: Iterable[nn.Module]
    ) -> None:
        self._arriving, self._parts = arriving, parts
        self._modules = [weakref.ref(module) for module in modules]
        self.is_used = False

    def __call__(self, module: nn.Module) -> None:
        self.note_use()
        self._arriving.wait_for(self._parts)
        self.wake()

    def note_use(self) -> None:
        """Notes that it is used now, unless that was done. One alone has no order."""
        living = self._living()
        if living and not self.is_used and len(self._arriving._groups) > 1:
            layer_order.note_use(living[0])
            self.is_used = True

    def wake(self) -> None:
        """Wakes those of its modules that wait for this restore, and for no later one."""
        waiting = [m for m in self._living() if sleeping.sleeps_by(m, self)]
        all_or_nothing(lambda: self._wake(waiting))

    def _wake(self, modules: Sequence[nn.Module]) -> None:
        sleeping.wake_up(modules)
        with ordinary_state():
            _refresh([(p, p.there()) for p in self._parts], modules)

    def _living(self) -> list[nn.Module]:
        return [module for ref in self._modules if (module := ref()) is not None]


def _refresh(
    there: Iterable[tuple[_Part, list[torch.Tensor]]], modules: Iterable[nn.Module]
) -> None:
    """Brings what depends on the place of tensors in line with where they are now."""
    holdings = [
        Holding(part.nbytes, part.device, "", tensors[0].dtype, [""], tensors)
        for part, tensors in there
        if tensors
    ]
    kinds.refresh(Inventory(holdings, modules={str(i): m for i, m in enumerate(modules)}))


giving_back.under_way.append(wait_for)
