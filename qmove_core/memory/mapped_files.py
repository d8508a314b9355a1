"""Files of weights, mapped into memory: host memory that costs no RAM beyond the page cache.

A map is private (copy-on-write): tensors over it can be written to, which makes private copies of
the pages that are touched, and the file is never changed. For copies to a device its pages are
locked for reading only (`cudaHostRegisterReadOnly`), since a lock for writing would make a private
copy of each of them. They are unlocked as soon as the copies are done: a tensor that is written to
later gets a new private page, and a copy from pages locked before that would still read the old
one. So each transfer locks anew. Where the driver refuses, copies go unlocked. Not tried on a real
GPU yet: NVIDIA's open kernel module (os-mlock.c) marks what it unlocks as changed, so the system
may write the same bytes back to the file, which costs disk writes only.

A page that nobody has written to shows what is in the file *now*. Whether that still is what was
mapped is asked before a copy begins and when it is done, by the size and the time of the last
change of the very file that is mapped: one that was deleted or replaced under its name lives on for
the map. What cannot be seen:
- a change within the clock tick of the file system (milliseconds; seconds on some) in which the
file was mapped, or through a
  writable map of another process that has not reached the clock yet;
- a change while a streaming restore is under way, and one on a network file system that this
machine has not heard of;
- what somebody reads from a parked model on the CPU by himself: he sees the new bytes, and where
the file became shorter, the
  system ends the process (SIGBUS). Windows does not let a mapped file become shorter.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import mmap
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from ..digests.digest import Digest, digest_storages
from ..errors import QMoveError
from ..interrupts import interrupts_deferred
from . import arena, pinning
from .pages import round_to_pages

log = logging.getLogger("qmove")


class MappedFileChanged(QMoveError):
    """A file in which the weights of a parked model lie has other bytes now.

    The model stays parked.
    """

    def __init__(self, path: Path, names: Sequence[str], why: str) -> None:
        self.path, self.names = path, list(names)
        shown = ", ".join(self.names[:5]) + (
            f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        )
        super().__init__(
            f"The file {path} was changed after qmove.mirror_files mapped it ({why}), and weights "
            "of a parked model that lie in "
            f"it may be lost: {shown}. Nothing was moved. Write the old content into the file and "
            "try again, or load the model "
            "anew."
        )


class MappedFile:
    """One file in memory, page-locked piece by piece like a block of the arena
    (`arena.HostMemory`), but for reading only.

    Used with `registry.lock` held, like everything that copies. It lives as long as a storage over
    it, and then is unmapped.

    Raises:
        OSError: it cannot be opened or mapped.
        ValueError: it is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        self._stamp = self._stamp_now()
        self._memory = numpy.frombuffer(
            mmap.mmap(self._file, 0, access=mmap.ACCESS_COPY), dtype=numpy.uint8
        )
        self.address: int = self._memory.ctypes.data
        self.nbytes = len(self._memory)
        self._pinned: set[int] = set()  # pieces
        self._refused = False
        self.lent: Lent | None = None  # to the transfer that has locked some of it

    def storage(
        self, name: str, start: int, end: int, released: Callable[[int], None]
    ) -> torch.UntypedStorage:
        """A storage over [start, end), which keeps the file mapped.

        It can be read, written and saved, but not resized.
        """
        piece = self._memory[start:end]
        with torch.inference_mode(False):
            storage = torch.from_numpy(piece).untyped_storage()
        _slices[storage._cdata] = Slice(self, name, start, end - start)
        arena.note_place(storage, self, start)
        weakref.finalize(piece, _forget, storage._cdata, released).atexit = False
        return storage

    def bytes(self) -> torch.Tensor:
        """The whole file as a flat uint8 CPU tensor that shares its memory."""
        with torch.inference_mode(False):
            return torch.from_numpy(self._memory)

    def pin(self, start: int, end: int) -> bool:
        """Page-locks every piece that [start, end) touches, for reading; says whether all of them
        are locked."""
        for index in range(start // arena.PIECE, -(-end // arena.PIECE)):
            if index in self._pinned:
                continue
            if self._refused or not pinning.is_possible():
                return False
            with interrupts_deferred():
                if not pinning.register(*self._piece(index), read_only=True):
                    self._refused = True
                    return False
                self._pinned.add(index)
                _locked[id(self)] = self
        return True

    def unpin(self) -> None:
        """Unlocks all of it. No copy from it may be under way."""
        with interrupts_deferred():
            unlocked = [pinning.unregister(self._piece(index)[0]) for index in self._pinned]
            self.forget_pins()
            if not all(unlocked):
                _never_unmapped.append(self)

    def forget_pins(self) -> None:
        """Nothing of it is locked any more, or the locks are those of the parent process."""
        self._pinned.clear()
        self._refused, self.lent = False, None
        _locked.pop(id(self), None)

    def is_unchanged(self) -> bool:
        """Whether the file is as it was when it was mapped, by its size and the time of its last
        change."""
        return self._stamp_now() == self._stamp

    def require_unchanged(self, storages: Sequence[torch.UntypedStorage]) -> None:
        """Raises MappedFileChanged if these storages over it may have other bytes than they had.

        A file that was touched, or has its old content again, is no error: digests tell.
        """
        if self.is_unchanged():
            return
        slices = [_slices[storage._cdata] for storage in storages]
        stamp = self._stamp_now()
        names = [part.name for part in slices]
        end = max(part.start + part.nbytes for part in slices)
        if stamp[0] < end:  # to read beyond it would end the process
            why = f"it has {stamp[0]} bytes now and had {self._stamp[0]}"
            raise MappedFileChanged(self.path, names, why)
        found = digest_storages(storages)
        different = [
            part.name for part, digest in zip(slices, found, strict=True) if part.digest != digest
        ]
        if different:
            raise MappedFileChanged(
                self.path, different, "its bytes are not those that the digests were taken of"
            )
        log.info("%s was written to, but still holds the weights that were mapped", self.path)
        if len(slices) == sum(
            part.file is self for part in _slices.values()
        ):  # the others have not been looked at
            self._stamp = stamp

    def _stamp_now(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns

    def _piece(self, index: int) -> tuple[int, int]:
        """Address and bytes of a piece; the last one ends with the last page."""
        start = index * arena.PIECE
        return self.address + start, min(arena.PIECE, round_to_pages(self.nbytes) - start)


@dataclass(slots=True)
class Slice:
    """Where a storage lies in a file, the name that its bytes have there, and their digest when
    they were mapped."""

    file: MappedFile
    name: str
    start: int
    nbytes: int
    digest: Digest | None = None


_slices: dict[int, Slice] = {}  # by storage._cdata
_locked: dict[int, MappedFile] = {}  # of which pieces are locked: these must stay mapped
_never_unmapped: list[MappedFile] = []  # the driver would not let go of them


def slice_of(storage: torch.UntypedStorage) -> Slice | None:
    """Where a storage lies in a mapped file; None for any other storage."""
    part = _slices.get(storage._cdata)
    return part if part is not None and arena.place_of(storage) is not None else None


def in_changed_files(storages: Sequence[torch.UntypedStorage]) -> list[bool]:
    """For each of these storages over files that nobody has written to whether the file has other
    bytes now."""
    changed = set()
    for file, some in _by_file(storages).items():
        try:
            file.require_unchanged(some)
        except MappedFileChanged:
            log.info(
                "%s was changed: what was loaded from it is parked as any other weights", file.path
            )
            changed.add(file)
    return [_slices[storage._cdata].file in changed for storage in storages]


def note_digest(storage: torch.UntypedStorage, digest: Digest) -> None:
    """Notes what is in a storage over a file."""
    _slices[storage._cdata].digest = digest


def nbytes() -> int:
    """Bytes of mapped files that storages look at. They are in the page cache, or on the disk."""
    return sum(part.nbytes for part in list(_slices.values()))


def _by_file(
    storages: Iterable[torch.UntypedStorage],
) -> dict[MappedFile, list[torch.UntypedStorage]]:
    """Those of the storages that lie in files."""
    grouped: dict[MappedFile, list[torch.UntypedStorage]] = defaultdict(list)
    for storage in storages:
        part = slice_of(storage)
        if part is not None:
            grouped[part.file].append(storage)
    return grouped


class Lent:
    """The files that a transfer copies from, until all of its copies are done."""

    def __init__(self, sources: Iterable[torch.UntypedStorage]) -> None:
        self._storages = _by_file(sources)
        self._files = list(self._storages)
        self._under_way: set[_Arrival] = set()

    def begin(self) -> None:
        """Looks at the files, and takes away locks that are older than this transfer.

        Raises:
            MappedFileChanged: a file has other bytes now.
        """
        self.require_unchanged()
        for file in self._files:
            if (
                file.lent is not None
            ):  # a streaming restore from the same file is still under way, or failed
                file.lent.finish()
            file.lent = self

    def let_go_of_storages(self) -> None:
        """When all copies are queued: whoever waits for them keeps the storages, and asks whether
        he is the only one."""
        self._storages.clear()

    def require_unchanged(self) -> None:
        """Raises MappedFileChanged if a file has other bytes now."""
        for file, storages in self._storages.items():
            file.require_unchanged(storages)

    def until(self, event: Any, source: torch.UntypedStorage) -> Any:
        """The event itself, or for what comes from a file one that unlocks the files when the last
        of them was waited for."""
        if slice_of(source) is None:
            return event
        arrival = _Arrival(event, self)
        self._under_way.add(arrival)
        return arrival

    def arrived(self, arrival: _Arrival) -> None:
        """One copy is over."""
        self._under_way.discard(arrival)
        if not self._under_way:
            self.release()

    def finish(self) -> None:
        """Waits for all copies, also when one of them raises, and unlocks."""
        with ExitStack() as all_of_them:
            all_of_them.callback(self.release)
            for arrival in list(self._under_way):
                all_of_them.callback(arrival.event.synchronize)

    def release(self) -> None:
        """Unlocks the files. No copy may be under way."""
        self._under_way.clear()
        self._storages.clear()
        for file in self._files:
            if file.lent is self:
                file.unpin()


class _Arrival:
    """Stands for an event after which something has been copied from a file."""

    def __init__(self, event: Any, lent: Lent) -> None:
        self.event, self._lent = event, lent

    def query(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        try:
            self.event.synchronize()
        finally:  # a copy that failed is over as well
            self._lent.arrived(self)


def _forget(storage_cdata: int, released: Callable[[int], None]) -> None:
    """A storage died: a finalizer, so no lock and no driver."""
    _slices.pop(storage_cdata, None)
    arena.forget_place(storage_cdata)
    released(storage_cdata)


def _at_exit() -> None:
    """Unmapping what is locked is forbidden, and copies may be under way: the process ends with
    both."""
    for file in list(_locked.values()):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(file._memory))


def _in_forked_child() -> None:
    for file in list(_locked.values()):
        file.forget_pins()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
