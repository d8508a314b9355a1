"""A streaming restore: the model is home at once, while its bytes still arrive, and each part of it waits only for its own.

Until they have arrived
- the modules of a unit (`units.py`) are asleep: the first forward of one waits for all of the unit;
- the tensors are awaited (`awaiting.py`): whoever uses one in any other way waits for its bytes too.
The host does the waiting, so no stream anywhere can be too early; afterwards modules and tensors have their own classes back.

The host's bytes stay until everything is there: a copy that fails leaves the model parked, as it was.
"""

from __future__ import annotations

import functools
import logging
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from .. import devices, homes, hosting
from ..actions import Action
from ..homes import Origin, lock
from ..interrupts import interrupts_deferred
from ..memory import mirrors
from ..model.holdings import Inventory
from ..settings import settings
from ..storages import rebind
from ..transfer.copies import Load
from ..transfer.transaction import Cargo, Freight, Step
from . import layer_order, sleeping
from .layer_order import Unit
from .pending_tensors import await_bytes, release, waiter_of

log = logging.getLogger("qmove")

_under_way: list[Arrival] = []


def can_stream(held: Inventory, steps: Iterable[Step]) -> bool:
    """Whether a restore can be a streaming one: whatever uses the weights must do it where Python sees it."""
    if (
        settings.verify
        or held.wrappers
        or any(_is_compiled(module) for module in held.modules.values())
    ):
        return False
    return all(
        step.holding.device.type == "cpu"
        and step.target.type != "cpu"
        and devices.has_streams(step.target)
        for step in steps
    )


def _is_compiled(module: nn.Module) -> bool:
    if (
        isinstance(module, torch.jit.ScriptModule)
        or getattr(module, "_compiled_call_impl", None) is not None
    ):
        return True
    return any(cls.__name__ == "OptimizedModule" for cls in type(module).__mro__)


def bring(
    action: Action,
    held: Inventory,
    steps: Sequence[Step],
    *,
    on_commit: Callable[[], None],
    on_failure: Callable[[], None],
) -> None:
    """Queues the copies of `steps`, and commits at once.

    Args:
        on_failure: puts the model to sleep again, should a copy fail on its way.
    """
    freight = Freight(action, steps)
    try:
        freight.allocate_on_host()
        with (
            freight.queued() as loads,
            interrupts_deferred(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            arrival = Arrival(steps, loads, on_failure)
            try:
                freight.rebind(
                    held, lambda: arrival.begin(steps, layer_order.units_of(held), on_commit)
                )
            except BaseException:
                arrival.forget()
                raise
            arrival.take_over(freight.hand_over())
        loads.clear()
        arrival.look_who_shares()
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # as in `relocate`
        raise
    finally:
        freight.unload()
    if steps:
        hosting.tell_moved()


def settle(tensors: Iterable[torch.Tensor] | None = None) -> None:
    """Waits for the arrivals that bring one of these tensors, or for all; also ends those whose model is gone."""
    with lock:
        waiters = None if tensors is None else {id(waiter_of(tensor)) for tensor in tensors}
        for arrival in list(_under_way):
            if waiters is None or arrival.is_brought_by(waiters) or arrival.is_abandoned():
                arrival.finish()


class _Part:
    """One storage under way, and the tensors that look into it."""

    def __init__(self, arrival: Arrival, load: Load, step: Step) -> None:
        self.event, self.digest, self.target = load.arrival, load.digest, load.target
        self.tensors = [
            TensorWeakRef(tensor) for tensor in (*step.holding.tensors, *step.strangers)
        ]
        self.wait = functools.partial(arrival.wait_for, [self])
        self._finalizer = weakref.finalize(step.holding.tensors[0], self._drop_target)

    def _drop_target(self) -> None:
        """The tensor is gone: so is its memory, unless a copy still writes to it. Then the next move lets go of it."""
        if self.event is None or self.event.query():
            self.target = None

    def forget(self) -> None:
        """Ends this part, which its arrival and the garbage collector refer to."""
        self._finalizer.detach()
        self.target = None
        del self.wait

    def living(self) -> list[torch.Tensor]:
        return [tensor for ref in self.tensors if (tensor := ref()) is not None]


class Arrival:
    """One model under way. It holds the model weakly, and its storages until they are there."""

    def __init__(
        self, steps: Sequence[Step], loads: Sequence[Load], on_failure: Callable[[], None]
    ) -> None:
        self._parts = [_Part(self, load, step) for step, load in zip(steps, loads, strict=True)]
        self._modules: list[weakref.ref[nn.Module]] = []
        self._on_failure = on_failure
        self._sources: list[torch.UntypedStorage] = []
        self._origins: list[Origin | None] = []
        self._unshared = [False] * len(self._parts)

    def begin(
        self, steps: Sequence[Step], parts_of_it: Sequence[Unit], on_commit: Callable[[], None]
    ) -> None:
        """Lets everybody wait who could be too early. The tensors look at their new place already."""
        on_commit()
        part_of = {id(step.holding): part for step, part in zip(steps, self._parts, strict=True)}
        try:
            for part in self._parts:
                for tensor in part.living():
                    await_bytes(tensor, part.wait)
            for unit in parts_of_it:
                parts = [
                    part_of[id(holding)] for holding in unit.holdings if id(holding) in part_of
                ]
                if parts and unit.modules:
                    modules = [weakref.ref(module) for module in unit.modules]
                    self._modules += modules
                    sleeping.put_to_sleep(
                        unit.modules, functools.partial(self._wait_for_unit, parts, modules)
                    )
        except BaseException:
            self._release_all()
            raise

    def take_over(self, cargo: Cargo) -> None:
        """Keeps the host's bytes from here on. They are no parked model any more."""
        self._sources = cargo.sources
        self._origins = [homes.origin_of(source) for source in self._sources]
        for source in self._sources:
            homes.forget(source._cdata)
        if self._parts:
            _under_way.append(self)

    def look_who_shares(self) -> None:
        """Looks now whose bytes nobody else holds: who lets go of them later may have written to them before."""
        self._unshared = mirrors.unshared(self._sources)

    def is_brought_by(self, waiters: set[int]) -> bool:
        """Whether one of these functions (by their ids) waits for a part of this."""
        return any(id(part.wait) in waiters for part in self._parts)

    def is_abandoned(self) -> bool:
        """Whether the model is gone."""
        return not any(part.living() for part in self._parts)

    def _wait_for_unit(
        self, parts: Sequence[_Part], modules: Sequence[weakref.ref[nn.Module]], _module: nn.Module
    ) -> None:
        self.wait_for(parts)
        living = [module for ref in modules if (module := ref()) is not None]
        layer_order.used(living[0])
        sleeping.wake_up(living)

    def wait_for(self, parts: Sequence[_Part]) -> None:
        """Returns when these parts are there, and their tensors as they were."""
        with lock:
            if self not in _under_way:
                return
            self._synchronize(parts)
            for part in parts:
                for tensor in part.living():
                    release(tensor)
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
                self._keep_as_mirrors()
                self.forget()

    def _synchronize(self, parts: Sequence[_Part]) -> None:
        try:
            for part in parts:
                if part.event is not None:
                    part.event.synchronize()
                    part.event = None
        except Exception:
            self._put_back()
            raise

    def _put_back(self) -> None:
        """A copy failed: the model is parked again, with the bytes it had when it was."""
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            _under_way.remove(self)
            self._let_copies_end()
            self._release_all()
            for part, source, origin in zip(self._parts, self._sources, self._origins, strict=True):
                rebind(part.living(), source)
                if origin is not None:
                    homes.remember(source, origin)
            self._on_failure()
            self.forget()
        log.error("a copy failed on its way: the model is parked again")

    def _let_copies_end(self) -> None:
        """After one of them failed: no memory may be freed below the others."""
        for part in self._parts:
            if part.event is not None:
                try:
                    part.event.synchronize()
                except Exception as error:
                    log.debug("another copy failed as well: %s", error)
                part.event = None

    def _keep_as_mirrors(self) -> None:
        alive = [
            (part, source)
            for part, source, unshared in zip(
                self._parts, self._sources, self._unshared, strict=True
            )
            if unshared and part.target is not None
        ]
        targets = [
            part.target for part, _source in alive if part.target is not None
        ]  # an empty storage is false
        cargo = Cargo([source for _part, source in alive], targets)
        digests = [part.digest() for part, _source in alive]
        alive.clear()
        self._sources.clear()
        cargo.keep_as_mirrors(digests)

    def forget(self) -> None:
        """Lets go of everything, which finalizers of the model's tensors refer to."""
        for part in self._parts:
            part.forget()
        self._parts.clear()
        self._sources.clear()
        self._origins.clear()

    def _release_all(self) -> None:
        for part in self._parts:
            for tensor in part.living():
                release(tensor)
        sleeping.wake_up(module for ref in self._modules if (module := ref()) is not None)
