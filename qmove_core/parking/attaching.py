"""Gives a freshly built model the weights that another process has parked on disk to stay."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import devices, homes
from ..actions import Action
from ..attributes import Undo
from ..errors import CannotAttach, Pinned, first_of
from ..homes import Origin
from ..interrupts import all_or_nothing, interrupts_deferred
from ..memory import arena, disk_files
from ..memory.disk_files import WEIGHTS, DiskFile
from ..memory.disk_manifest import BadManifest, Manifest, SavedStorage, SavedTensor, parse
from ..memory.file_reading import ReadAhead
from ..memory.mapped_files import MappedFile, Part
from ..memory.ring import Ring
from ..model import kinds, saving
from ..model.inventory import inventory
from ..model.kinds import bitsandbytes_saved
from ..saved_tensors import HeaderEntry, NotSafetensors, read_header, read_metadata
from ..storages import as_bytes, empty, exchange, stand_in
from ..transfer.moves import MovePlan, StorageMove
from . import away_wrappers, pins, plans, sleeping
from .away_tensors import take_home
from .records import Record

log = logging.getLogger("qmove")


@dataclass(slots=True)
class _Place:
    """Where the bytes of a saved storage lie."""

    path: Path
    start: int


@dataclass
class Attached:
    """A model that looks into the files of a folder now.

    Attributes:
        plan: what was parked, for a report.
        left_out: names of what the folder has and the model does not need.
    """

    plan: MovePlan
    left_out: list[str] = field(default_factory=list)


def attach(
    model: object,
    folder: str | os.PathLike[str],
    wake: Callable[..., object],
    *,
    proves: bool,
) -> Attached:
    """Parks a model in what a folder has. With the lock of moves held.

    Args:
        proves: read every byte and compare its checksum now; otherwise when it is restored.

    Raises:
        CannotAttach: the model is as it was.
    """
    path = Path(folder).absolute()
    action = Action("attach", model, f"to {path.name}")
    undo = Undo()
    try:
        manifest, places = _read(action, path)
        held = inventory(model)
        _refuse_parked(action, path, held)
        pinned = pins.by_storage()
        if any(holding.storage._cdata in pinned for holding in held.holdings):
            raise Pinned(action, plans.title(model))
        shapes = {
            bitsandbytes_saved.same_name(name): (saved.dtype, saved.shape, storage.home)
            for storage in manifest.storages
            for saved in storage.tensors
            for name in saved.names
        }
        file = path / WEIGHTS
        try:
            problems, tables = bitsandbytes_saved.prepare(
                held.modules, manifest.quantized, shapes, undo
            )
        except (BadManifest, LookupError, TypeError, AttributeError) as error:
            raise CannotAttach(action, file, f"what it says is not whole ({error})") from error
        matching = saving.match(model, manifest, held.modules.values())
        problems += matching.problems
        if problems:
            problems = list(dict(reversed(problems)).items())[::-1]
            why = "it has other weights than this model"
            raise CannotAttach(action, file, why, problems)
        storages = _storages(action, file, matching.storages, places, proves)
        if matching.left_out:
            log.info("%s has no %s", plans.title(model), first_of(matching.left_out))
        parked = _parked_tables([*tables, *matching.own_tables])
        look_and_sleep = functools.partial(
            _look_and_sleep, model, action, matching.storages, storages, parked, wake
        )
        plan = _commit(look_and_sleep, undo)
        return Attached(plan, matching.left_out)
    except BaseException:
        with interrupts_deferred():
            all_or_nothing(undo.undo)
        raise


def _refuse_parked(action: Action, folder: Path, held: Any) -> None:
    for holding in held.holdings:
        origin = homes.origin_of_tensor(holding.tensors[0])
        if origin is not None and origin.is_away:
            raise CannotAttach(action, folder, "the model is parked; build it anew, or restore it")


# What a folder has -----------------------------------------------------------------------------


def _read(action: Action, folder: Path) -> tuple[Manifest, dict[int, _Place]]:
    """The manifest of a folder, and where each of its storages lies, by its `id`."""
    file = folder / WEIGHTS
    if not folder.is_dir():
        raise CannotAttach(action, folder, "there is no such folder")
    disk_files.remove_leftovers(folder)
    if not file.is_file():
        raise CannotAttach(action, file, "there is no such file: no model was parked there")
    try:
        entries, metadata = read_metadata(file)
        manifest = parse(metadata)
    except NotSafetensors as error:
        raise CannotAttach(action, file, f"it is not whole ({error})") from error
    except BadManifest as error:
        raise CannotAttach(action, file, str(error)) from error
    others: dict[str, dict[str, HeaderEntry]] = {}
    places = {}
    for storage in manifest.storages:
        if storage.file is None:
            where, found, exact = file, entries, False
        else:
            where = Path(storage.file)
            if storage.file not in others:
                others[storage.file] = _header_of(action, where)
            found, exact = others[storage.file], True
        entry = found.get(storage.tensor)
        alignment = max(getattr(torch, saved.dtype).itemsize for saved in storage.tensors)
        size = -1 if entry is None else entry.end - entry.start
        if (
            entry is None
            or (size != storage.nbytes if exact else size < storage.nbytes)
            or entry.start % alignment
        ):
            name = storage.tensors[0].names[0]
            problem = f"its {storage.nbytes} bytes are not in the file as {storage.tensor[:80]!r}"
            raise CannotAttach(action, where, "it has other tensors now", [(name, problem)])
        places[id(storage)] = _Place(where, entry.start)
    return manifest, places


def _header_of(action: Action, path: Path) -> dict[str, HeaderEntry]:
    if not path.is_file():
        why = "this file of the model's own has some of the weights, and is gone"
        raise CannotAttach(action, path, why)
    try:
        return read_header(path)
    except NotSafetensors as error:
        raise CannotAttach(action, path, f"it is not whole ({error})") from error


_Pairs = list[tuple[SavedStorage, list[tuple[SavedTensor, list[torch.Tensor]]]]]


def _storages(
    action: Action, file: Path, pairs: _Pairs, places: dict[int, _Place], proves: bool
) -> list[torch.UntypedStorage]:
    """A storage for each saved one: over its file, or in RAM for what is home there."""
    files: dict[Path, MappedFile] = {}
    parts: list[tuple[MappedFile, Part, bool]] = []
    storages = []
    for saved, _tensors in pairs:
        place = places[id(saved)]
        if place.path not in files:
            files[place.path] = _map(action, place.path, is_own=place.path == file)
        mapped = files[place.path]
        start, end = place.start, place.start + saved.nbytes
        name = saved.tensors[0].names[0]
        storages.append(
            mapped.storage_known(name, start, end, saved.checksum, homes.forget, fresh=False)
        )
        parts.append((mapped, mapped.part_at(start), saved.home == "cpu"))
    _prove(action, [(mapped, part) for mapped, part, on_host in parts if proves or on_host])
    for index, (mapped, part, on_host) in enumerate(parts):
        if on_host:
            content = empty(part.end - part.start, dtype=torch.uint8, device="cpu")
            if len(content):
                mapped.read(part.start, content)
            storages[index] = content.untyped_storage()
    return storages


def _map(action: Action, path: Path, *, is_own: bool) -> MappedFile:
    try:
        return DiskFile(path) if is_own else MappedFile(path)
    except (OSError, ValueError) as error:
        raise CannotAttach(action, path, f"it cannot be mapped into memory ({error})") from error


def _prove(action: Action, parts: list[tuple[MappedFile, Part]]) -> None:
    """Reads bytes and compares them with their checksums."""
    stamps = {mapped: mapped.stamp() for mapped, _part in parts}
    ring = Ring(sum(part.end - part.start for _mapped, part in parts))
    try:
        places = [(mapped, part.start) for mapped, part in parts]
        with ReadAhead(ring, places, locked=False) as files:
            wrong = list(files.differing())
    finally:
        ring.end()
    if wrong:
        mapped, _part, error = wrong[0]
        problems = {
            part.name: "its bytes are not those that were written"
            if problem is None
            else f"it cannot be read ({problem})"
            for other, part, problem in reversed(wrong)
            if other is mapped
        }
        why = "it was altered or damaged since the model was parked there"
        raise CannotAttach(action, mapped.path, why, list(problems.items())[::-1]) from error
    for mapped, part in parts:
        part.stamp = stamps[mapped]


# The commit ------------------------------------------------------------------------------------


def _commit(look_and_sleep: Callable[[Undo], MovePlan], undo: Undo) -> MovePlan:
    """Lets every tensor look into its new storage, and parks the model: wholly or not at all.

    Afterwards nothing is undone any more.
    """
    own = Undo()

    def step() -> MovePlan:
        own.undo()  # what was begun before another thread's exception came
        plan = look_and_sleep(own)
        undo.forget()
        own.forget()
        return plan

    with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
        return all_or_nothing(step, own.undo)


def _look_and_sleep(
    model: object,
    action: Action,
    pairs: _Pairs,
    storages: list[torch.UntypedStorage],
    tables: list[_Table],
    wake: Callable[..., object],
    undo: Undo,
) -> MovePlan:
    undo.note(lambda: kinds.refresh(inventory(model)))
    changed = [tensor for _s, tensors in pairs for _saved, some in tensors for tensor in some]
    undo.note(take_home, [*changed, *(table.table for table in tables)])
    homes_by_cdata: dict[int, torch.device] = {}
    for (saved, tensors), storage in zip(pairs, storages, strict=True):
        home = _home(saved.home)
        if home.type == "cpu":
            homes.settle(storage)
        else:
            homes_by_cdata[storage._cdata] = home
        for one, its_tensors in tensors:
            for tensor in its_tensors:
                _look(tensor, storage, one, undo)
    for table in tables:
        table.look(undo)
        homes_by_cdata[table.place._cdata] = table.home
    held = inventory(model)
    kinds.refresh(held)
    undo.note(away_wrappers.take_home, [outer for _name, outer in held.wrappers])
    record = Record(model, (), wake)
    moves = []
    for holding in held.holdings:
        home_of = homes_by_cdata.get(holding.storage._cdata)
        if home_of is not None:
            origin = Origin(home_of, holding.nbytes, record, plans.weakly(holding.tensors))
            move = StorageMove(holding, devices.CPU, origin)
            move.came_from = home_of
            moves.append(move)
            undo.note(homes.forget, move.source._cdata)
            homes.remember(move.source, origin)
    undo.note(sleeping.wake_up, list(held.modules.values()))
    plans.fall_asleep(record, held, moves)
    for move in moves:
        move.drop_storages()
    return MovePlan(action, held, moves, lambda: None)


@dataclass(slots=True)
class _Table:
    """A table of bitsandbytes that belongs to the model, and goes home with its weights."""

    table: torch.Tensor
    place: torch.UntypedStorage
    home: torch.device

    def look(self, undo: Undo) -> None:
        """Lets the table look into its place on the host."""
        undo.note(_set_data, self.table, self.table.data)
        self.table.data = empty(0, dtype=self.table.dtype, device="cpu").set_(
            self.place, 0, self.table.size(), self.table.stride()
        )


def _parked_tables(tables: list[tuple[torch.Tensor, str]]) -> list[_Table]:
    """What can fail of parking them, before anything is changed."""
    made = []
    for table, name in tables:
        home = _home(name)
        if home.type != "cpu":
            (place,) = arena.allocate([table.nbytes], homes.forget)
            content = table.detach().reshape(-1).view(torch.uint8)
            with torch.inference_mode(False), torch.no_grad():
                as_bytes(place).copy_(content)
            made.append(_Table(table, place, home))
    return made


def _home(name: str) -> torch.device:
    """The device with this name, or the one that this machine has in its place."""
    if name in devices.known():
        return torch.device(name)
    current = devices.accelerator()
    return devices.CPU if current is None else devices.resolve(current)


def _look(
    tensor: torch.Tensor, storage: torch.UntypedStorage, saved: SavedTensor, undo: Undo
) -> None:
    """Lets a tensor look into a storage as it was saved; also one that has no data yet."""
    with torch._C.DisableTorchFunctionSubclass(), torch.inference_mode(tensor.is_inference()):
        view = empty(0, dtype=tensor.dtype, device="cpu").set_(
            storage, saved.offset, saved.shape, saved.stride
        )
        view = view.conj() if "conj" in saved.bits else view
        view = torch._neg_view(view) if "neg" in saved.bits else view
        if tensor.is_meta:
            other = stand_in(tensor, view)
            undo.note(_exchange_back, tensor, other)
            exchange(tensor, other)
        else:
            undo.note(_set_data, tensor, tensor.data)
            tensor.data = view


def _exchange_back(tensor: torch.Tensor, other: torch.Tensor) -> None:
    if not tensor.is_meta:
        exchange(tensor, other)


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    with (
        torch._C.DisableTorchFunctionSubclass(),
        torch.no_grad(),
        torch.inference_mode(tensor.is_inference()),
    ):
        tensor.data = data
