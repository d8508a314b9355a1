"""Parks models on disk: in a temporary file of this process, or in a folder to stay.

What is parked there lies in a mapped file, exactly as after `mirror_files`: everything that parks,
restores, streams, swaps and moves works as with any parked model.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import homes
from ..collector import collection_deferred
from ..digests.checksum import Checksum
from ..errors import CannotWriteToDisk, readable_bytes
from ..interrupts import interrupts_deferred
from ..memory import arena, disk_files
from ..memory.blocks import place_of
from ..memory.disk_files import WEIGHTS, DiskFile, DiskWriter, entry_name
from ..memory.disk_manifest import BadManifest, Manifest, SavedStorage, parse
from ..memory.mapped_files import MappedFile
from ..model import saving
from ..model.holdings import Holding
from ..saved_tensors import NotSafetensors, read_metadata
from ..settings import settings
from ..transfer.copies import Progress
from ..transfer.moves import Done, MovePlan, StorageMove
from ..transfer.reading_out import pieces_of
from ..transfer.transaction import MoveTransaction
from . import layer_order

log = logging.getLogger("qmove")


@dataclass(frozen=True)
class Target:
    """Where a park goes to.

    Attributes:
        folder: None where none was given or configured.
        stays: whether the model is to be found there by a later process.
    """

    folder: Path | None
    stays: bool

    def goes_along(self, holding: Holding) -> bool:
        """Whether a parked storage is to go to the disk: it takes RAM, or lies in a file that does
        not stay."""
        block, start = place_of(holding.storage) or (None, 0)
        if not isinstance(block, MappedFile) or not block.shows(start):
            return True
        return self.stays and block.is_own and not self._has_it(block)

    def _has_it(self, block: MappedFile) -> bool:
        return (
            isinstance(block, DiskFile)
            and self.folder is not None
            and block.is_still_at(self.folder / WEIGHTS)
        )


def target(to: str, folder: str | os.PathLike[str] | None) -> Target | None:
    """Where `park(to=..., folder=...)` goes to; None: to RAM.

    Raises:
        ValueError: there is no such place.
    """
    if to not in ("ram", "disk"):
        raise ValueError(f'park(to=...) is "ram" or "disk", not {to!r}.')
    if to == "ram":
        if folder is not None:
            raise ValueError('park(folder=...) is for to="disk" only.')
        return None
    if folder is not None:
        return Target(Path(folder).absolute(), stays=True)
    return Target(settings.disk_folder, stays=False)


def carry_out(
    model: object, plan: MovePlan, where: Target, progress: Progress | None = None
) -> Done:
    """Writes what a plan parks, and lets the model lie in the file. All of it, or nothing.

    Raises:
        CannotWriteToDisk: the disk is full, the folder is not there, ...
    """
    spares = arena.spare_bytes()
    with MoveTransaction(plan) as transaction:
        with collection_deferred():
            transaction.use_mirrors()
        written = _write(model, plan, where, progress)
        verified = settings.verify and transaction.verify()
        with interrupts_deferred() as later, collection_deferred():
            stragglers = transaction.commit(later)
    # What was page-locked would wait for the next park: here RAM is what is wanted.
    arena.trim(keep=spares)
    return Done(written, stragglers, verified, transaction.reserved_after)


@dataclass(slots=True)
class _Item:
    """One storage for the file.

    Attributes:
        source: where its bytes are now.
        move: what lets the model look into the file then; None for what stays where it is.
        saved: what the file says of it; None in a temporary one, which nobody reads later.
        checksum: of its bytes, where it is known.
        reference: the model's own file that has it already, and its name there.
    """

    holding: Holding
    source: torch.UntypedStorage
    move: StorageMove | None
    saved: SavedStorage | None = None
    checksum: int | None = None
    reference: tuple[str, str] | None = None


class _Stopped(Exception):
    """What a caller's `progress` has raised, which is none of our errors."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def _write(model: object, plan: MovePlan, where: Target, progress: Progress | None) -> int:
    """Gives every move of a plan a target in a file. Returns the bytes written."""
    if where.folder is None:
        advice = 'Call qmove.configure(disk_folder="...") first, or give park a folder.'
        raise CannotWriteToDisk(plan.action, None, "no folder is set for parked models", advice)
    if where.stays:
        items, manifest = _all_of(model, plan)
        if _is_there(items, manifest, where.folder / WEIGHTS):
            log.info("%s has all of it already: nothing is written", where.folder)
            return 0
    else:
        items, manifest = [_item(m.holding, m) for m in plan.moves if not _is_in_file(m)], None
        if not items:
            return 0
    try:
        disk_files.make_folder(where.folder)
        disk_files.remove_leftovers(where.folder)
        return _write_file(where.folder, items, manifest, progress)
    except _Stopped as stopped:
        raise stopped.error from None
    except OSError as error:
        raise _failure(plan, where.folder, error) from error


def _item(holding: Holding, move: StorageMove | None) -> _Item:
    # Of a mirror in RAM that is no longer true there is a target as well, to be written over.
    mirror = move.target if move is not None and move.is_unchanged else None
    return _Item(holding, holding.storage if mirror is None else mirror, move)


def _is_in_file(move: StorageMove) -> bool:
    """Whether a mirror has it in a file already."""
    place = None if move.target is None else place_of(move.target)
    return place is not None and place[0].is_file


def _all_of(model: object, plan: MovePlan) -> tuple[list[_Item], Manifest]:
    """Everything that a model has, for a file that stays: also what is home on the host."""
    moves = {id(move.holding): move for move in plan.moves}
    holdings = [h for h in layer_order.holdings_in_order(plan.held) if not h.lacks_bytes]
    known = {id(holding) for holding in holdings}
    holdings += [move.holding for move in plan.moves if id(move.holding) not in known]
    manifest = saving.describe(model, plan.held, holdings)
    items = []
    for holding, saved in zip(holdings, manifest.storages, strict=True):
        move = moves.get(id(holding))
        if move is not None or saved.tensors:
            item = _item(holding, move)
            item.saved = saved if saved.tensors else None
            _find_in_files(item)
            items.append(item)
    manifest.storages = [item.saved for item in items if item.saved is not None]
    return items, manifest


def _find_in_files(item: _Item) -> None:
    """Looks whether the bytes lie in a file already: the model's own, or one of ours."""
    block, start = place_of(item.source) or (None, 0)
    if isinstance(block, MappedFile) and block.shows(start):
        part = block.part_at(start)
        item.checksum = part.checksum
        if not block.is_own and item.saved is not None:
            item.reference = str(block.path.resolve()), part.name


def _is_there(items: Sequence[_Item], manifest: Manifest, path: Path) -> bool:
    """Whether the file that is there has all of it: then every move has a target that is there."""
    for item in items:
        block, _start = place_of(item.source) or (None, 0)
        if item.move is not None and (
            item.checksum is None
            or (
                item.reference is None
                and not (isinstance(block, DiskFile) and block.is_still_at(path))
            )
        ):
            return False
    try:
        there = parse(read_metadata(path)[1])
    except (NotSafetensors, BadManifest):
        return False
    for item in items:
        if item.checksum is None:  # it is home on the host, where anybody may have changed it
            item.checksum = _checksum_of(item.source)
        _note(item, "")
    return _without_places(manifest) == _without_places(there)


def _without_places(manifest: Manifest) -> object:
    storages = [(s.nbytes, s.checksum, s.home, s.file, s.tensors) for s in manifest.storages]
    return storages, manifest.wrappers, manifest.quantized


def _checksum_of(storage: torch.UntypedStorage) -> int:
    checksum = Checksum(storage.nbytes())
    with closing(pieces_of([storage])) as pieces:
        for piece in pieces:
            checksum.update(piece.content)
    return checksum.value


def _note(item: _Item, tensor: str) -> None:
    """Notes for the file what is known of a storage by now."""
    if item.saved is not None:
        item.saved.checksum = item.checksum or 0
        item.saved.file, item.saved.tensor = item.reference or (None, tensor)


def _write_file(
    folder: Path, items: Sequence[_Item], manifest: Manifest | None, progress: Progress | None
) -> int:
    used = Counter(item.reference for item in items)
    for item in items:
        if used[item.reference] > 1:
            item.reference = None  # two that are equal now need not stay so
    written = [item for item in items if item.reference is None]
    sizes = [item.holding.nbytes for item in written]
    _require_room(folder, sum(sizes))

    def metadata() -> bytes:
        names = map(entry_name, range(len(written)))
        for item in items:
            _note(item, next(names) if item.reference is None else "")
        return b"{}" if manifest is None else manifest.to_metadata()

    name = None if manifest is None else WEIGHTS
    with DiskWriter(folder, sizes, len(metadata()), name) as writer:
        _write_pieces(writer, written, progress)
        file = writer.finish(metadata())
    for item, start in zip(written, writer.starts, strict=True):
        if item.move is not None:
            end, checksum = start + item.holding.nbytes, item.checksum or 0
            item.move.target = file.storage_known(
                item.holding.name, start, end, checksum, homes.forget, fresh=True
            )
            item.move.is_unchanged, item.move.mirror = True, None
    return sum(sizes)


def _write_pieces(writer: DiskWriter, written: Sequence[_Item], progress: Progress | None) -> None:
    done, total = 0, sum(item.holding.nbytes for item in written)
    checksums = [Checksum(item.holding.nbytes) for item in written]
    with closing(pieces_of([item.source for item in written])) as pieces:
        for piece in pieces:
            checksums[piece.index].update(piece.content)
            at = writer.starts[piece.index] + piece.start
            writer.write(at, piece.content.numpy().data)
            done += piece.content.numel()
            if progress is not None:
                try:
                    progress(done, total)
                except BaseException as error:
                    raise _Stopped(error) from None
    for item, checksum in zip(written, checksums, strict=True):
        item.checksum = checksum.value


def _require_room(folder: Path, needed: int) -> None:
    room = disk_files.room_in(folder)
    if room is not None and room < needed:
        why = f"it needs {readable_bytes(needed)} there, and {readable_bytes(room)} are free"
        raise OSError(errno.ENOSPC, why, str(folder))


def _failure(plan: MovePlan, folder: Path, error: OSError) -> CannotWriteToDisk:
    named = error.filename2 or error.filename
    path = Path(os.fsdecode(named)) if isinstance(named, (str, bytes)) else folder
    advice = "Look at the folder and its disk, or choose another folder."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "Free room on that disk, or choose a folder on another one."
    elif error.errno in (errno.ENOENT, errno.ENOTDIR):
        advice = f"Is the disk there? Make {folder.parent}, or choose another folder."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "Make it a folder that this user may write to, or choose another one."
    elif error.errno == errno.EFBIG:
        advice = "A limit on the size of files is in the way (ulimit -f), or the file system's own."
    return CannotWriteToDisk(plan.action, path, error.strerror or str(error), advice)
