"""One move as one transaction: check, allocate, copy, commit. Whatever fails on the way leaves the model where it was."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from . import budget, devices, hosting, kinds, registry
from .allocation import allocate, bytes_by_device
from .interrupts import interrupts_deferred
from .inventory import Holding, Inventory
from .rebinding import rebind
from .strangers import Straggler, holders_of, tensors_on
from .transfer import Progress, copy_storages

log = logging.getLogger("qmove")


@dataclass(slots=True)
class Step:
    """One storage of a plan: where it goes, and what is to be known of it there."""

    holding: Holding
    target: torch.device
    origin: registry.Origin | None = None
    strangers: list[torch.Tensor] = field(default_factory=list)


def relocate(
    action: str,
    inventory: Inventory,
    steps: Sequence[Step],
    *,
    on_commit: Callable[[], None],
    progress: Progress | None = None,
) -> tuple[int, list[Straggler]]:
    """Carries out `steps`: all of them, or none.

    Args:
        action: what the user asked for, for error messages ("Parking Llama").
        inventory: what the model holds; `steps` are about its holdings.
        on_commit: called when everything lies in its new place; if it raises, all goes back.
        progress: called as (bytes done, bytes in all) while copying.

    Returns:
        The bytes copied, and what did not leave its old device.
    """
    wanted = [(step.holding.nbytes, step.target) for step in steps]
    budget.require(action, bytes_by_device(wanted))
    sources = [step.holding.storage for step in steps]
    targets = allocate(action, wanted, "Free memory there first, for example qmove.park() another model.")
    try:
        copied = copy_storages(list(zip(sources, targets, strict=True)), progress)
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            _commit(inventory, steps, sources, targets, on_commit)
            watched = [StorageWeakRef(source) for source in sources]
            sources.clear()
            stragglers = _take_strangers_along(steps, targets, watched)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)  # the loops that were left have storages in their variables
        raise
    finally:
        # Whoever keeps the traceback keeps this frame: it must not keep the bytes alive as well.
        sources.clear()
        targets.clear()
    devices.release_cached({step.holding.device for step in steps})
    if steps:
        hosting.tell_moved()
    return copied, stragglers


def _commit(
    inventory: Inventory,
    steps: Sequence[Step],
    sources: Sequence[torch.UntypedStorage],
    targets: Sequence[torch.UntypedStorage],
    on_commit: Callable[[], None],
) -> None:
    """Lets every tensor look into its new storage, and puts all of them back if anything goes wrong."""
    try:
        for step, target in zip(steps, targets, strict=True):
            rebind(step.holding.tensors + step.strangers, target)
        kinds.settle(inventory)
        on_commit()
    except BaseException:
        for step, source in zip(steps, sources, strict=True):
            rebind(step.holding.tensors + step.strangers, source)
        kinds.settle(inventory)
        raise
    for step, target in zip(steps, targets, strict=True):
        if step.origin is not None:
            registry.remember(target, step.origin)


def _take_strangers_along(
    steps: Sequence[Step], targets: Sequence[torch.UntypedStorage], watched: Sequence[StorageWeakRef]
) -> list[Straggler]:
    """Looks at which old storages live on, takes the tensors that hold them along, and reports what cannot be."""
    alive = {
        ref.cdata: (step, target)
        for ref, step, target in zip(watched, steps, targets, strict=True)
        if step.holding.device.type != "cpu" and not ref.expired()
    }
    if not alive:
        return []
    for cdata, tensors in tensors_on(alive.keys()).items():
        _take_along(tensors, *alive[cdata])
        tensors.clear()
    return [
        Straggler(step.holding.name, step.holding.device, step.holding.nbytes, holders_of(ref.cdata))
        for ref, step in zip(watched, steps, strict=True)
        if ref.cdata in alive and not ref.expired()
    ]


def _take_along(tensors: list[torch.Tensor], step: Step, target: torch.UntypedStorage) -> None:
    rebind(tensors, target)
    if step.origin is not None:
        step.origin.strangers += [TensorWeakRef(tensor) for tensor in tensors]
    log.debug("took %d tensors outside the model along with %s", len(tensors), step.holding.name)
