"""Meta tensors to real ones: a model that accelerate spread over devices, RAM and disk becomes an ordinary one again.

A transaction: find the data of every meta tensor, check it and the budget, read, commit. Before the commit nothing of the
model has changed. A meta Parameter stays the same object: it exchanges its implementation with a real tensor's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import devices, homes
from ..actions import Action
from ..devices import Device, DeviceMap
from ..digests.checksum import checksum_of
from ..errors import readable_bytes
from ..integrations import diffusers_offload
from ..integrations.accelerate_dispatch import Slot, is_dispatched, take_off, take_off_pipelines
from ..integrations.dispatch_options import remember
from ..integrations.weights_map import Source
from ..interrupts import interrupts_deferred
from ..memory.allocation import allocate
from ..model import kinds
from ..model.holdings import Holding, Inventory
from ..model.inventory import inventory
from ..model.kinds import bitsandbytes_offloaded
from ..storages import exchange, stand_in, tensor_over
from ..transfer.copies import Progress
from .plan import DEVICE_ADVICE, Piece, check_budget, placement, plan
from .reading import Read, read

log = logging.getLogger("qmove")


def materialize_meta_tensors(
    model: Any, target_device: Device | DeviceMap = "cpu", *, progress: Progress | None = None
) -> Any:
    """Gives every meta tensor its real data, and takes accelerate's dispatch off. Materializing a whole model does nothing.

    What was real stays where it is. To the CPU nothing goes through VRAM. Weights that lie in RAM are used where they lie, those
    in safetensors files through private memory maps: the files are never written, and must not be overwritten in place.

    Args:
        model: a module, a pipeline, or anything that holds them.
        target_device: for the meta tensors: a device, or a device_map from name prefixes ("" for the rest) to devices.
        progress: called as `progress(bytes_done, bytes_in_all)`; what it raises stops everything with nothing changed.

    Returns:
        `model`, the same object with the same Parameter objects. It moves as any model does.

    Raises:
        OffloadedDataError: data is missing, truncated, or not what the model needs; file and tensor are named.
        MetaTensorsPresent: nobody has data for some meta tensors.
        NotEnoughMemory: RAM, a cgroup, `ram_limit` or VRAM; nothing was changed.
    """
    materialize(model, target_device, progress)
    return model


@dataclass
class Materialized:
    """What was done, and all that is needed to undo it.

    Attributes:
        pieces: the tensors that were materialized.
        homes: the device of everything that was real before, by name; for what was parked, its home.
        was_parked: anything was.
        buffers: (registered, name, tensor) of the real buffers: `nn.Module.to` exchanges buffers for new objects.
        groups: those of diffusers' group offload.
        undo: closing it brings the objects back. What was changed since then is lost: see `undo.py`.
    """

    pieces: list[Piece] = field(default_factory=list)
    homes: dict[str, torch.device] = field(default_factory=dict)
    was_parked: bool = False
    buffers: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = field(
        default_factory=list
    )
    groups: list[Any] = field(default_factory=list)
    undo: ExitStack = field(default_factory=ExitStack)


def materialize(
    model: object,
    target_device: Device | DeviceMap,
    progress: Progress | None = None,
    *,
    wants_digests: bool = False,
) -> Materialized | None:
    """As `materialize_meta_tensors`. Returns what is needed to undo it (to see changes, that takes digests).

    None: there was nothing to materialize.
    """
    started = time.perf_counter()
    with homes.lock:
        action = Action("materialize", model)
        place = placement(target_device)
        held = inventory(model)
        modules = list(held.modules.values())
        groups, pipelines = (
            diffusers_offload.groups_of(modules),
            diffusers_offload.pipelines_in(model),
        )
        if not held.meta and not groups and not is_dispatched(modules):
            return None
        pieces = plan(action, held, place)
        check_budget(action, pieces)
        _read(action, pieces, progress, wants_digests)
        done = Materialized(
            pieces,
            homes={name: _home(holding) for holding in held.holdings for name in holding.names},
            was_parked=any(homes.parked_home(holding.tensors[0]) for holding in held.holdings),
            groups=groups,
            buffers=[
                (module._buffers, name, buffer)
                for module in held.modules.values()
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.device.type != "meta"
            ],
        )
        with interrupts_deferred():
            _commit(model, held, done, pipelines)
    _report(model, done, time.perf_counter() - started)
    return done


def _read(
    action: Action, pieces: Sequence[Piece], progress: Progress | None, wants_digests: bool
) -> None:
    """Brings the bytes of all pieces in. The model has not changed yet."""
    missing = [piece for piece in pieces if not piece.joins_real]
    _allocate(action, missing)
    reads = {
        id(piece): Read(piece.source, piece.opened, piece.real, wants_digests)
        for piece in missing
        if piece.source.file is not None
        or not piece.is_shared  # what the model shares with the map needs no reading
    }
    read(list(reads.values()), progress)
    devices.synchronize({piece.device for piece in missing})
    if wants_digests:
        for piece in pieces:
            if piece.joins_real:
                piece.digest = checksum_of(piece.tensor)
            elif id(piece) in reads:
                piece.digest = reads[id(piece)].digest


def _allocate(action: Action, pieces: Sequence[Piece]) -> None:
    """Memory for every piece that cannot look into its source."""
    needy = [piece for piece in pieces if not piece.is_shared]
    storages = allocate(
        action, [(piece.tensor.nbytes, piece.device) for piece in needy], DEVICE_ADVICE
    )
    for piece, storage in zip(needy, storages, strict=True):
        piece.real = tensor_over(storage, piece.tensor.dtype, piece.tensor.shape)


def _commit(model: object, held: Inventory, done: Materialized, pipelines: Sequence[Any]) -> None:
    """Puts the data into the model and takes the hooks off; all of it, or none."""
    try:
        remember(held.modules.values())
        take_off(held.modules.values(), done.undo)
        take_off_pipelines(pipelines, done.undo)
        diffusers_offload.take_off(held.modules.values(), done.undo)
        for piece in done.pieces:
            _fill(piece, done.undo)
        kinds.refresh(inventory(model))
    except BaseException:
        done.undo.close()
        raise


def _fill(piece: Piece, undo: ExitStack) -> None:
    """Gives the tensor of a piece its data, and puts it into all of its slots."""
    if not piece.joins_real:
        twin = stand_in(piece.tensor, piece.opened if piece.real is None else piece.real)
        exchange(piece.tensor, twin)
        undo.callback(exchange, piece.tensor, twin)
        if piece.parts:
            parts = {name: _part(source, piece.device) for name, source in piece.parts.items()}
            bitsandbytes_offloaded.attach(piece.tensor, piece.slots[0].module, parts, undo)
            piece.part_digests = part_digests(piece.tensor, piece.slots[0])
    for slot in piece.slots:
        if slot.tensor is not piece.tensor:
            slot.put(piece.tensor)
            undo.callback(slot.put, slot.tensor)


def _part(source: Source, device: torch.device) -> torch.Tensor:
    """A tensor object of its own; for one in a file also memory of its own."""
    part = source.open().detach()
    return part.to(device) if source.file is None else part.to(device, copy=True)


def part_digests(tensor: torch.Tensor, slot: Slot) -> dict[str, int]:
    """The digests of what hangs on a quantized weight now."""
    parts = bitsandbytes_offloaded.current_parts(tensor, slot.module)
    return {name: checksum_of(part) for name, part in parts.items()}


def _home(holding: Holding) -> torch.device:
    return homes.parked_home(holding.tensors[0]) or holding.device


def _report(model: object, done: Materialized, seconds: float) -> None:
    made = [piece for piece in done.pieces if not piece.joins_real]
    from_disk = [piece for piece in made if piece.source.file is not None]
    nbytes = sum(piece.source.nbytes for piece in from_disk)
    files = len({piece.source.file for piece in from_disk})
    log.info(
        "materialized %s: %s in %d tensors, of which %s read from %d files, in %.2f s (%.1f GB/s)",
        *(
            type(model).__name__,
            readable_bytes(sum(piece.tensor.nbytes for piece in made)),
            len(made),
        ),
        *(readable_bytes(nbytes), files),
        *(seconds, nbytes / seconds / 1e9),
    )
