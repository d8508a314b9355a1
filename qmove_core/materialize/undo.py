"""The way back: a materialized model gets the very dispatch again that it had, and keeps what was changed meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .. import devices, homes
from ..actions import Action
from ..devices import Device, DeviceMap
from ..digests.checksum import checksum_of
from ..errors import ChangesNotKept
from ..integrations import diffusers_offload
from ..integrations.accelerate_dispatch import Slot
from ..integrations.weights_map import keep_instead
from ..memory import budget
from ..model.holdings import Inventory
from ..model.inventory import inventory
from ..parking import requests
from ..storages import exchange, stand_in
from ..transfer.copies import Progress
from ..transfer.transaction import Step, relocate
from .materialize import Materialized, materialize, part_digests
from .plan import Piece

log = logging.getLogger("qmove")


@contextmanager
def materialized(
    model: Any, target_device: Device | DeviceMap = "cpu", *, progress: Progress | None = None
) -> Iterator[Any]:
    """Makes `model` whole inside the body, and gives it the same dispatch back after it, also when the body raises.

    After it the hooks and the meta tensors are the same objects as before, and what was real is where it was. Inside, the model
    may be moved, parked, run and changed. Changed weights are kept: in the state dict in RAM, which goes before a file. No
    file is written, and none is read again.

    Args:
        model, target_device, progress: as for `materialize_meta_tensors`.

    Raises:
        As `materialize_meta_tensors`. On leaving also ChangesNotKept, for weights that were removed, cast or reshaped, and
        NotEnoughMemory: then the model stays materialized, with its changes, and without its dispatch.
    """
    done = materialize(model, target_device, progress, wants_digests=True)
    try:
        yield model
    finally:
        if done is not None:
            undo(model, done)


def undo(model: object, done: Materialized) -> None:
    """Undoes `materialize`, and keeps changes; see `materialized`."""
    action = Action("dispatch", model, "again")
    with homes.lock:
        if requests.is_parked(model) and not done.was_parked:
            requests.restore(model)
        held = inventory(model)
        changes = _changes(action, done, held)
        _check_budget(action, changes)
        groups = {
            id(change.piece.group): change.piece.group
            for change in changes
            if change.piece.group is not None
        }
        use_new_files = [diffusers_offload.write_again(group) for group in groups.values()]
        away = [
            (holding, home)
            for holding in held.holdings
            if (
                home := next(
                    (done.homes[name] for name in holding.names if name in done.homes), None
                )
            )
            is not None
            and holding.device != home
            and homes.parked_home(holding.tensors[0]) is None  # parked before, and still so
        ]
        # Nothing is remembered of where the bytes come from: the dispatch says where things belong.
        steps = [Step(holding, home) for holding, home in away]
        relocate(
            action, held, steps, on_commit=lambda: _commit(action, done, changes, use_new_files)
        )
    log.info("dispatched %s again: %d weights had changed", type(model).__name__, len(changes))


@dataclass(frozen=True)
class _Change:
    piece: Piece
    slot: Slot
    value: torch.Tensor  # what the model has now


def _changes(action: Action, done: Materialized, held: Inventory) -> list[_Change]:
    """What must be written to where the dispatch keeps its weights."""
    changes, problems = [], []
    for piece in done.pieces:
        for slot in piece.slots:
            value = slot.get()
            problem = _obstacle(piece, value)
            if problem:
                problems.append((slot.full_name, problem))
            elif value is not None and _is_changed(piece, value):
                changes.append(_Change(piece, slot, value))
    names = {id(tensor): holding.name for holding in held.holdings for tensor in holding.tensors}
    problems += [
        (names.get(id(tensor), "?"), why)
        for tensor, why in diffusers_offload.mismatches(done.groups)
    ]
    if problems:
        raise ChangesNotKept(action, problems)
    return changes


def _obstacle(piece: Piece, value: torch.Tensor | None) -> str:
    """Why the place of a weight in the dispatch cannot hold what the model has there now."""
    if value is None:
        return "it was removed"
    if value.device.type == "meta":
        return "it is on the meta device, and its data is gone"
    if value.dtype != piece.dtype or value.shape != piece.shape:
        return f"it is {_described(value.dtype, value.shape)} now and was {_described(piece.dtype, piece.shape)}"
    if value is not piece.slots[0].get():
        return f"it is no longer tied to {piece.name}"
    if piece.parts and part_digests(value, piece.slots[0]) != piece.part_digests:
        return "what its quantized values are to be multiplied with has changed"
    return ""


def _is_changed(piece: Piece, value: torch.Tensor) -> bool:
    if _looks_into_source(piece, value):
        return False  # what was written to it is already there
    return piece.digest is None or checksum_of(value) != piece.digest


def _looks_into_source(piece: Piece, value: torch.Tensor) -> bool:
    in_ram = piece.source.file is None
    same_place = value.device == piece.opened.device and value.data_ptr() == piece.opened.data_ptr()
    return in_ram and piece.is_shared and same_place and value.stride() == piece.opened.stride()


def _check_budget(action: Action, changes: list[_Change]) -> None:
    """Changed weights that lie on a device need room on the host; those on the host stay where they are."""
    arriving = {
        id(change.value): change.value for change in changes if change.value.device.type != "cpu"
    }
    nbytes = sum(value.nbytes for value in arriving.values())
    budget.require(action, {devices.CPU: nbytes})


def _commit(
    action: Action,
    done: Materialized,
    changes: list[_Change],
    use_new_files: list[Callable[[], None]],
) -> None:
    kept: dict[int, torch.Tensor] = {}
    refused = []
    for change in changes:
        piece, value = change.piece, change.value
        if piece.group is not None:
            continue
        if piece.source.file is None and piece.source.dtype == value.dtype:
            with torch.no_grad(), torch.inference_mode(piece.opened.is_inference()):
                piece.opened.copy_(value)
            continue
        with torch.inference_mode(False):
            on_host = kept.setdefault(id(value), value.detach().cpu())
        if not keep_instead(change.slot.hook.weights_map, change.slot.key, on_host):
            refused.append((change.slot.full_name, "its weights map takes no new entries"))
    if refused:
        raise ChangesNotKept(action, refused)
    for use in use_new_files:
        use()
    diffusers_offload.update_pinned_copies(done.groups)
    done.undo.close()
    for piece in done.pieces:
        for slot in piece.slots:
            slot.put(slot.tensor)
    for registered, name, buffer in done.buffers:
        _put_buffer_back(registered, name, buffer)


def _put_buffer_back(
    registered: dict[str, torch.Tensor | None], name: str, buffer: torch.Tensor
) -> None:
    """The same object, with the value that its place has now."""
    value = registered.get(name)
    if (
        value is not None
        and value is not buffer
        and value.dtype == buffer.dtype
        and value.shape == buffer.shape
    ):
        exchange(buffer, stand_in(buffer, value))
        registered[name] = buffer


def _described(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} of shape {list(shape)}"
