"""A streaming restore: the model is home at once, and each part of it waits only for its own bytes.

Until they have arrived
- the modules of a layer group (`layer_order.py`) are asleep: the first forward of one waits for the
group;
- the tensors are pending (`pending_tensors.py`): any other use of one waits for its bytes too.
The host waits, so no stream anywhere can be too early. Afterwards modules and tensors have their
own classes back. The host's bytes stay until everything is there: a copy that fails leaves the
model parked.

Whoever waits waits for one restore: what waits for a later one is left alone when an earlier one
ends.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from .. import devices, homes, hosting
from ..homes import Origin, lock
from ..interrupts import interrupts_deferred
from ..settings import settings
from ..storages import rebind
from ..transfer.copies import CopyJob, Transfer
from ..transfer.moves import MovePlan, StorageMove
from ..transfer.transaction import MoveTransaction, keep_as_mirrors, unshared
from . import layer_order, sleeping
from .layer_order import LayerGroup
from .pending_tensors import await_bytes, release

log = logging.getLogger("qmove")

_under_way: list[StreamingRestore] = []


def can_stream(plan: MovePlan) -> bool:
    """Whether a restore can stream: what uses the weights must do it where Python sees it."""
    held = plan.held
    if settings.verify or held.wrappers or any(map(_is_compiled, held.modules.values())):
        return False
    return all(
        move.came_from.type == "cpu"
        and move.device.type != "cpu"
        and devices.has_streams(move.device)
        for move in plan.moves
    )


def _is_compiled(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if getattr(module, "_compiled_call_impl", None) is not None:
        return True
    return any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)


def restore_streaming(plan: MovePlan, sleep_again: Callable[[], None]) -> None:
    """Queues the copies of a plan, and commits at once.

    Args:
        sleep_again: puts the model to sleep, should a copy fail on its way.
    """
    arriving = StreamingRestore(plan.moves, sleep_again)
    begin = functools.partial(arriving.begin, layer_order.groups_of(plan.held), plan.on_commit)
    digests = settings.keep_mirrors
    try:
        with MoveTransaction(dataclasses.replace(plan, on_commit=begin)) as transaction:
            transaction.allocate_on_host()
            with Transfer(plan.nbytes, wait=False, digests=digests) as transfer:
                transaction.start(transfer, plan.moves)
                with interrupts_deferred():
                    arriving.take_over(plan.moves)
                    transaction.commit()
                    _under_way.append(arriving)
    except BaseException:
        if arriving not in _under_way:
            arriving.forget()
        raise
    arriving.note_who_shares()  # only now does no other record of ours hold the sources
    hosting.tell_moved()


def wait_for(storages: Iterable[torch.UntypedStorage] | None = None) -> None:
    """Waits for the restores that bring one of these storages, or for all of them.

    Also ends those whose model is gone.
    """
    with lock:
        wanted = None if storages is None else {storage._cdata for storage in storages}
        for arriving in list(_under_way):
            if wanted is None or arriving.brings(wanted) or arriving.is_abandoned():
                arriving.finish()


class _Part(CopyJob):
    """One storage under way, and weak references to the tensors that look into it."""

    __slots__ = ("__weakref__", "_finalizer", "origin", "tensors", "wait", "was_unshared")

    def __init__(self, arriving: StreamingRestore, move: StorageMove) -> None:
        super().__init__(move.source, move.device)
        self.tensors = [TensorWeakRef(t) for t in (*move.holding.tensors, *move.outsiders)]
        self.origin: Origin | None = homes.origin_of(move.source)
        self.was_unshared = False
        self.wait = functools.partial(arriving.wait_for, [self])
        self._finalizer = weakref.finalize(move.holding.tensors[0], self._drop_target)

    def take_over(self, move: StorageMove) -> None:
        """Knows the copy, now that it is queued."""
        self.target, self.arrival, self.read_digest = move.target, move.arrival, move.read_digest

    def living(self) -> list[torch.Tensor]:
        """Its tensors that are alive and have not been given other data meanwhile."""
        return [tensor for ref in self.tensors if (tensor := ref()) is not None]

    def forget(self) -> None:
        """Drops everything; finalizers and the garbage collector may still refer to this object."""
        self._finalizer.detach()
        self.drop_storages()
        self.origin = None
        del self.wait

    def _drop_target(self) -> None:
        """Its tensor is gone: frees the memory, unless a copy still writes to it."""
        if self.arrival is None or self.arrival.query():
            self.target = None


class StreamingRestore:
    """One restore whose bytes are arriving. It holds the model weakly, and its storages."""

    def __init__(self, moves: Sequence[StorageMove], sleep_again: Callable[[], None]) -> None:
        self._parts = [_Part(self, move) for move in moves]
        self._holdings = [id(move.holding) for move in moves]
        self._groups: list[_Group] = []
        self._sleep_again = sleep_again

    def take_over(self, moves: Sequence[StorageMove]) -> None:
        """Knows the copies, now that they are queued."""
        for part, move in zip(self._parts, moves, strict=True):
            part.take_over(move)

    def begin(self, groups: Sequence[LayerGroup], on_commit: Callable[[], None]) -> None:
        """Lets everything wait that could be too early. The tensors look at their new place."""
        on_commit()
        part_of = dict(zip(self._holdings, self._parts, strict=True))
        try:
            for part in self._parts:
                for tensor in part.living():
                    await_bytes(tensor, part.wait)
            for group in groups:
                parts = [part_of[id(h)] for h in group.holdings if id(h) in part_of]
                if parts and group.modules:
                    self._groups.append(_Group(self, parts, group.modules))
                    sleeping.put_to_sleep(group.modules, self._groups[-1])
        except BaseException:
            self._release_all()
            raise

    def note_who_shares(self) -> None:
        """Notes which host bytes nobody else holds now, while nobody can have written to them."""
        for part, alone in zip(self._parts, unshared(self._parts), strict=True):
            part.was_unshared = alone

    def brings(self, storages: set[int]) -> bool:
        """Whether one of these storages (`_cdata`) is a part of it."""
        return any(p.target is not None and p.target._cdata in storages for p in self._parts)

    def is_abandoned(self) -> bool:
        """Whether the model is gone."""
        return not any(part.living() for part in self._parts)

    def wait_for(self, parts: Sequence[_Part]) -> None:
        """Returns when these parts are there, and their tensors as they were."""
        with lock:
            if self not in _under_way:
                return
            self._synchronize(parts)
            self._release(parts)
            if parts and self._parts[-1] in parts:
                self.finish()

    def finish(self) -> None:
        """Returns when everything is there."""
        with lock:
            if self not in _under_way:
                return
            self._synchronize(self._parts)
            with interrupts_deferred():
                _under_way.remove(self)
                self._release_all()
                arrived = [p for p in self._parts if p.was_unshared and p.target is not None]
                for part in arrived:
                    part.digest = part.read_digest()
                keep_as_mirrors(arrived)
                self.forget()

    def forget(self) -> None:
        """Drops everything, which finalizers of the model's tensors may still refer to."""
        for part in self._parts:
            part.forget()
        self._parts.clear()
        self._groups.clear()

    def _synchronize(self, parts: Sequence[_Part]) -> None:
        try:
            for part in parts:
                if part.arrival is not None:
                    part.arrival.synchronize()
                    part.arrival = None
        except Exception:
            self._park_again()
            raise

    def _park_again(self) -> None:
        """A copy failed: the model is parked again, with the bytes it had when it was."""
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            _under_way.remove(self)
            self._let_copies_end()
            self._release_all()
            for part in self._parts:
                rebind(part.living(), part.source)
                if part.origin is not None:
                    homes.remember(part.source, part.origin)
            self._sleep_again()
            self.forget()
        log.error("a copy failed on its way: the model is parked again")

    def _let_copies_end(self) -> None:
        """After one of them failed: no memory may be freed below the others."""
        for part in self._parts:
            if part.arrival is not None:
                try:
                    part.arrival.synchronize()
                except Exception as error:
                    log.debug("another copy failed as well: %s", error)
                part.arrival = None

    def _release_all(self) -> None:
        self._release(self._parts)
        for group in self._groups:
            group.wake()

    def _release(self, parts: Iterable[_Part]) -> None:
        for part in parts:
            for tensor in part.living():
                release(tensor, part.wait)


class _Group:
    """What wakes the modules of one layer group: the arrival of its parts."""

    def __init__(
        self, arriving: StreamingRestore, parts: Sequence[_Part], modules: Iterable[nn.Module]
    ) -> None:
        self._arriving, self._parts = arriving, parts
        self._modules = [weakref.ref(module) for module in modules]

    def __call__(self, _module: nn.Module) -> None:
        self._arriving.wait_for(self._parts)
        layer_order.note_use(self._living()[0])
        self.wake()

    def wake(self) -> None:
        """Wakes those of its modules that wait for this restore, and for no later one."""
        sleeping.wake_up(m for m in self._living() if sleeping.sleeps_by(m, self))

    def _living(self) -> list[nn.Module]:
        return [module for ref in self._modules if (module := ref()) is not None]
