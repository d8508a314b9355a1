"""Gives a materialized model the dispatch back that it had, and keeps what was changed."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import devices, homes
from ..actions import Action
from ..class_variants import own_class
from ..devices import Device, DeviceMap
from ..digests.checksum import checksum_of
from ..errors import ChangesNotKept
from ..integrations import diffusers_offload
from ..integrations.tensor_slots import Slot
from ..integrations.weights_map import keep_instead
from ..interrupts import all_or_nothing
from ..memory import budget
from ..model.holdings import Inventory
from ..model.inventory import inventory
from ..model.kinds import wrappers
from ..moving import moving
from ..parking import requests
from ..storages import exchange, stand_in
from ..tracebacks import keeping_nothing
from ..transfer.copies import Progress
from ..transfer.moves import MovePlan, StorageMove
from ..transfer.transaction import carry_out
from .materialize import Materialized, materialize, part_checksums
from .plan import TensorPlan

log = logging.getLogger("qmove")


@contextmanager
def materialized(
    model: Any, target_device: Device | DeviceMap = "cpu", *, progress: Progress | None = None
) -> Iterator[Any]:
    """Materializes `model` for the body, and dispatches it again after it, also when that raises.

    After it the hooks and the meta tensors are the same objects as before, and what was real is
    where it was. Inside, the model may be moved, parked, run and changed. Changed weights are kept:
    in the state dict in RAM, which goes before a file. No file is written, and none is read again.

    Args:
        model: as for `materialize_meta_tensors`.
        target_device: as for `materialize_meta_tensors`.
        progress: as for `materialize_meta_tensors`.

    Raises:
        QMoveError: as `materialize_meta_tensors`.
        ChangesNotKept: on leaving, for weights that were removed, cast or reshaped.
        NotEnoughMemory: on leaving: then the model stays materialized, with its changes, and
            without its dispatch.
    """
    found: list[Materialized] = []

    try:  # twice: an interrupt may come between the body and the first one
        try:
            materialize(model, target_device, progress, checksums=True, note=found.append)
            yield model
        finally:
            _dispatch_again(model, found)
    finally:
        _dispatch_again(model, found)


@keeping_nothing()
def _dispatch_again(model: object, found: list[Materialized]) -> None:
    try:
        for done in found:
            all_or_nothing(functools.partial(undo, model, done))
    finally:
        found.clear()


@moving()
def undo(model: object, done: Materialized) -> None:
    """Undoes `materialize`, unless that is undone, and keeps changes; see `materialized`."""
    if not done.is_done:
        return
    action = Action("dispatch", model, "again")
    if requests.is_parked(model) and not done.was_parked:
        requests.restore(model)
    held = inventory(model)
    changes = _changes(action, done, held)
    # Changed weights on a device need room on the host; those on the host stay where they are.
    arriving = {id(value): value.nbytes for *_, value in changes if value.device.type != "cpu"}
    budget.require(action, {devices.CPU: sum(arriving.values())})
    groups = {id(planned.group): planned.group for planned, _slot, _value in changes}
    use_new_files = [
        diffusers_offload.write_again(group) for group in groups.values() if group is not None
    ]
    moves = []
    for holding in held.holdings:
        known = [done.homes[name] for name in holding.names if name in done.homes]
        was_parked = homes.parked_home(holding.tensors[0]) is not None  # and still is
        if known and known[0] != holding.device and not was_parked:
            # Nothing is remembered of where the bytes come from: the dispatch says where
            # things belong.
            moves.append(StorageMove(holding, known[0]))
    carry_out(MovePlan(action, held, moves, lambda: _commit(action, done, changes, use_new_files)))
    log.info("dispatched %s again: %d weights had changed", type(model).__name__, len(changes))


Change = tuple[TensorPlan, Slot, torch.Tensor]  # the last is what the model has now


def _changes(action: Action, done: Materialized, held: Inventory) -> list[Change]:
    """What must be written to where the dispatch keeps its weights."""
    changes: list[Change] = []
    problems = []
    for planned in done.plans:
        for slot in planned.slots:
            value = slot.get()
            problem = _obstacle(planned, value)
            if problem:
                problems.append((slot.full_name, problem))
            elif value is not None and _is_changed(planned, value):
                changes.append((planned, slot, value))
    names = {id(tensor): holding.name for holding in held.holdings for tensor in holding.tensors}
    problems += [
        (names.get(id(tensor), "?"), why)
        for tensor, why in diffusers_offload.mismatches(done.groups)
    ]
    if problems:
        raise ChangesNotKept(action, problems)
    return changes


def _obstacle(planned: TensorPlan, value: torch.Tensor | None) -> str:
    """Why the place of a weight in the dispatch cannot hold what the model has there now."""
    if value is None:
        return "it was removed"
    if value.device.type == "meta":
        return "it is on the meta device, and its data is gone"
    now_class, class_before = own_class(value), own_class(planned.tensor)
    if planned.is_wrapper and now_class is not class_before:
        return f"it is {now_class.__name__} now, and was {class_before.__name__}"
    if value.dtype != planned.dtype or value.shape != planned.shape:
        now, before = (
            f"{str(dtype).removeprefix('torch.')} of shape {list(shape)}"
            for dtype, shape in ((value.dtype, value.shape), (planned.dtype, planned.shape))
        )
        return f"it is {now} now and was {before}"
    if value is not planned.slots[0].get():
        return f"it is no longer tied to {planned.name}"
    if planned.parts and part_checksums(value, planned.slots[0]) != planned.part_checksums:
        return "the scales of its quantized values have changed"
    return ""


def _is_changed(planned: TensorPlan, value: torch.Tensor) -> bool:
    if planned.is_wrapper:
        inside = zip(wrappers.innermost(value), wrappers.innermost(planned.opened), strict=True)
        return not all(_is_same(inner, original) for inner, original in inside)
    opened = planned.opened
    in_ram = planned.source.file is None and planned.is_shared
    same_place = value.device == opened.device and value.data_ptr() == opened.data_ptr()
    if in_ram and same_place and value.stride() == opened.stride():
        return False  # what was written to it is already in the source
    return planned.checksum is None or checksum_of(value) != planned.checksum


def _is_same(inner: torch.Tensor, original: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        if (inner.device, inner.data_ptr()) == (original.device, original.data_ptr()):
            return inner.stride() == original.stride()
    return checksum_of(inner) == checksum_of(original)


def _commit(
    action: Action,
    done: Materialized,
    changes: list[Change],
    use_new_files: list[Callable[[], None]],
) -> None:
    if not done.changes_are_kept:
        _keep(action, done, changes, use_new_files)
        done.changes_are_kept = True
    done.undo.undo()
    for planned in done.plans:
        for slot in planned.slots:
            slot.put(slot.tensor)
    for slot in done.buffers:
        _put_buffer_back(slot)
    done.is_done = False


def _keep(
    action: Action,
    done: Materialized,
    changes: list[Change],
    use_new_files: list[Callable[[], None]],
) -> None:
    """Writes what was changed to where the dispatch keeps its weights."""
    kept: dict[int, torch.Tensor] = {}
    refused = []
    for planned, slot, value in changes:
        if planned.group is not None:
            continue
        if planned.is_wrapper:
            inside = zip(wrappers.innermost(value), wrappers.innermost(planned.opened), strict=True)
            for inner, original in inside:
                with torch.no_grad(), torch.inference_mode(original.is_inference()):
                    original.copy_(inner)
            continue
        if planned.source.file is None and planned.source.dtype == value.dtype:
            with torch.no_grad(), torch.inference_mode(planned.opened.is_inference()):
                planned.opened.copy_(value)
            continue
        with torch.inference_mode(False):
            on_host = kept.setdefault(id(value), value.detach().cpu())
        if not keep_instead(slot.hook.weights_map, slot.key, on_host):
            refused.append((slot.full_name, "its weights map takes no new entries"))
    if refused:
        raise ChangesNotKept(action, refused)
    for use in use_new_files:
        use()
    diffusers_offload.update_pinned_copies(done.groups)


def _put_buffer_back(slot: Slot) -> None:
    """The same object, with the value that its place has now."""
    value, buffer = slot.get(), slot.tensor
    if value is None or value is buffer:
        return
    if value.dtype == buffer.dtype and value.shape == buffer.shape:
        exchange(buffer, stand_in(buffer, value))
        slot.put(buffer)
