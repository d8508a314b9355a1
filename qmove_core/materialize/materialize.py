"""Gives a model that accelerate spread over devices, RAM and disk its real tensors.

A transaction: find the data of every meta tensor, check it and the budget, read, commit. Before the
commit nothing of the model has changed. A meta Parameter stays the same object: it exchanges its
implementation with a real tensor's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import devices, homes
from ..actions import Action
from ..attributes import Undo
from ..devices import Device, DeviceMap
from ..digests.checksum import checksum_of
from ..errors import readable_bytes
from ..integrations import diffusers_offload
from ..integrations.accelerate_dispatch import (
    is_dispatched,
    remember_options,
    take_off,
    take_off_pipelines,
)
from ..integrations.tensor_slots import Slot, registered_slots
from ..integrations.weights_map import Source
from ..interrupts import all_or_nothing, interrupts_deferred
from ..memory.budget import allocate
from ..model import kinds
from ..model.inventory import inventory
from ..model.kinds import bitsandbytes_offloaded, wrappers
from ..moving import moving
from ..storages import exchange, stand_in, tensor_over
from ..transfer.copies import Progress
from .plan import DEVICE_ADVICE, TensorPlan, check_budget, placement, plan
from .reading import read

log = logging.getLogger("qmove")


def materialize_meta_tensors(
    model: Any, target_device: Device | DeviceMap = "cpu", *, progress: Progress | None = None
) -> Any:
    """Gives every meta tensor its real data, and takes accelerate's dispatch off.

    A model without meta tensors stays as it is, and so does what was real. To the CPU nothing goes
    through VRAM. Weights that lie in RAM are used where they lie, those in safetensors files
    through private memory maps: the files are never written, and must not be overwritten in place.

    Args:
        model: a module, a pipeline, or anything that holds them.
        target_device: for the meta tensors: a device, or a device_map from name prefixes ("" for
            the rest) to devices.
        progress: called as `progress(bytes_done, bytes_in_all)`; what it raises stops everything
            with nothing changed.

    Returns:
        `model`, the same object with the same Parameter objects. It moves as any model does.

    Raises:
        OffloadedDataError: data is missing, truncated, or not what the model needs; file and tensor
            are named.
        MetaTensorsPresent: no dispatch has data for some meta tensors.
        NotEnoughMemory: RAM, a cgroup, `ram_limit` or VRAM; nothing was changed.
    """
    materialize(model, target_device, progress)
    return model


@dataclass
class Materialized:
    """What was done, and all that is needed to undo it.

    Attributes:
        plans: the tensors that were materialized.
        homes: the device of everything that was real before, by name; for what was parked, its
            home.
        was_parked: anything was.
        buffers: the slots of the real buffers: `nn.Module.to` exchanges buffers for new objects.
        groups: those of diffusers' group offload.
        undo: brings the objects back. What was changed since then is lost: see `undo.py`.
        is_done: it is done, and not undone.
        changes_are_kept: undoing has got so far.
    """

    plans: list[TensorPlan]
    homes: dict[str, torch.device]
    was_parked: bool
    buffers: list[Slot]
    groups: list[Any]
    undo: Undo = field(default_factory=Undo)
    is_done: bool = False
    changes_are_kept: bool = False


@moving()
def materialize(
    model: object,
    target_device: Device | DeviceMap,
    progress: Progress | None = None,
    *,
    checksums: bool = False,
    note: Callable[[Materialized], object] = lambda done: None,
) -> None:
    """As `materialize_meta_tensors`.

    Args:
        checksums: takes them, to see changes later.
        note: called with what undoes it, before anything changes; not if there is nothing to
            materialize.
    """
    started = time.perf_counter()
    action, place, held = (
        Action("materialize", model),
        placement(target_device),
        inventory(model),
    )
    modules = list(held.modules.values())
    groups = diffusers_offload.groups_of(modules)
    if not held.meta and not groups and not is_dispatched(modules):
        return
    plans = plan(action, held, place)
    check_budget(action, plans)
    _read(action, plans, progress, checksums)
    home = [homes.parked_home(holding.tensors[0]) for holding in held.holdings]
    done = Materialized(
        plans,
        homes={
            name: parked_home or holding.device
            for holding, parked_home in zip(held.holdings, home, strict=True)
            for name in holding.names
        },
        was_parked=any(home),
        groups=groups,
        buffers=[
            slot
            for slot in registered_slots(held.modules)
            if slot.is_buffer and slot.tensor.device.type != "meta"
        ],
    )
    note(done)
    with interrupts_deferred():
        _commit(model, modules, done)
    _report(model, plans, time.perf_counter() - started)


def _read(
    action: Action, plans: Sequence[TensorPlan], progress: Progress | None, checksums: bool
) -> None:
    """Brings the bytes of all tensors into memory. The model has not changed yet."""
    lacking = [p for p in plans if not (p.is_real or p.is_shared or p.is_wrapper)]
    sizes = [(planned.tensor.nbytes, planned.device) for planned in lacking]
    storages = allocate(action, sizes, DEVICE_ADVICE)
    for planned, storage in zip(lacking, storages, strict=True):
        planned.data = tensor_over(storage, planned.dtype, planned.shape)
    read([planned for planned in plans if planned.needs_reading], progress, checksums=checksums)
    for planned in plans:
        if planned.is_wrapper and not planned.is_real:
            planned.inner = [t.to(planned.device) for t in wrappers.innermost(planned.opened)]
    devices.synchronize({planned.device for planned in plans if not planned.is_real})
    for planned in plans:
        if checksums and planned.is_real and not planned.is_wrapper:
            planned.checksum = checksum_of(planned.tensor)


def _commit(model: object, modules: Sequence[nn.Module], done: Materialized) -> None:
    """Puts the data into the model and takes the hooks off; all of it, or none."""
    try:
        remember_options(modules)
        take_off(modules, done.undo)
        take_off_pipelines(diffusers_offload.pipelines_in(model), done.undo)
        diffusers_offload.take_off(modules, done.undo)
        for planned in done.plans:
            _fill(planned, done.undo)
        kinds.refresh(inventory(model))
        done.is_done = True
    except BaseException:
        all_or_nothing(done.undo.undo)
        raise


def _fill(planned: TensorPlan, undo: Undo) -> None:
    """Gives a tensor its data, and puts it into all of its slots."""
    tensor, slots = planned.tensor, planned.slots
    if planned.is_wrapper and not planned.is_real:
        inside = zip(wrappers.innermost(tensor), planned.inner, strict=True)
        twins = [(inner, stand_in(inner, content)) for inner, content in inside]
        device = planned.inner[0].device if planned.inner else planned.device
        twins += [(outer, wrappers.empty_like(outer, device)) for outer in wrappers.outers(tensor)]
        for part, twin in twins:
            undo.note(_empty_again, part, twin)
            exchange(part, twin)
    elif not planned.is_real:
        twin = stand_in(tensor, planned.opened if planned.data is None else planned.data)
        undo.note(_empty_again, tensor, twin)
        exchange(tensor, twin)
        if planned.parts:
            parts = {name: _part(source, planned.device) for name, source in planned.parts.items()}
            bitsandbytes_offloaded.attach(tensor, slots[0].module, parts, undo)
            planned.part_checksums = part_checksums(tensor, slots[0])
    for slot in slots:
        if slot.tensor is not tensor:
            undo.note(slot.put, slot.tensor)
            slot.put(tensor)


def _empty_again(tensor: torch.Tensor, twin: torch.Tensor) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        is_meta = torch.Tensor.is_meta.__get__(tensor)  # type: ignore[attr-defined]
    if not is_meta:
        exchange(tensor, twin)


def _part(source: Source, device: torch.device) -> torch.Tensor:
    """A tensor object of its own; for one in a file also memory of its own."""
    part = source.open().detach()
    return part.to(device) if source.file is None else part.to(device, copy=True)


def part_checksums(tensor: torch.Tensor, slot: Slot) -> dict[str, int]:
    """The checksums of the parts of a quantized weight, as they are now."""
    parts = bitsandbytes_offloaded.current_parts(tensor, slot.module)
    return {name: checksum_of(part) for name, part in parts.items()}


def _report(model: object, plans: Sequence[TensorPlan], seconds: float) -> None:
    made = [planned for planned in plans if not planned.is_real]
    from_disk = [planned.source for planned in made if planned.source.file is not None]
    nbytes = sum(source.nbytes for source in from_disk)
    log.info(
        "materialized %s: %s in %d tensors, of which %s read from %d files, in %.2f s (%.1f GB/s)",
        type(model).__name__,
        readable_bytes(sum(planned.tensor.nbytes for planned in made)),
        len(made),
        readable_bytes(nbytes),
        len({source.file for source in from_disk}),
        seconds,
        nbytes / seconds / 1e9 if seconds > 0 else 0.0,
    )
