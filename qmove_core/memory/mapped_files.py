"""Files of weights, mapped into memory: host memory that costs no RAM beyond the page cache.

A map is private (copy-on-write): tensors over it can be written to, which makes private copies of
the pages that are touched, and the file is never changed. A page that nobody has written to shows
what is in the file *now*. So nothing that a file says of itself is taken for proof:

- Each storage has the checksum of the bytes that it had when the model was on its device. What is
  read for a restore is compared with it before the model sees it. If it differs, the file itself is
  read: with the old checksum it was the owner who has changed the parked weights, which is right;
  otherwise the file was changed, and the restore is refused.
- Before the copy on the device is given up the file's size and times must be those at which its
  bytes were last found right: among them the time of the last change (`st_ctime`), which nobody can
  set. Where there is none (Windows), or it is so young that a later change may have the same, the
  bytes are read and compared.
- What is read for a restore is read from the file where nobody has written to its pages, past the
  page cache where it is not there yet (`O_DIRECT`); and else from the map, by the kernel
  (`pages.read`): a file that has become shorter is an error then, where a plain read of the map
  would end the process.

What it costs: a restore reads each byte once more, for the checksum; the disk is read straight into
page-locked slots of the ring (`file_reading.py`). The pages of the file itself are not locked:
drivers of most cards refuse to (`cudaHostRegisterReadOnly` needs a device that shares the host's
page tables), others make private copies of them.

Two things can't be helped: a file that is overwritten while its model is parked has lost those
weights (the restore says which); and whoever reads a parked tensor on the CPU by himself reads the
map: what the file has now, and SIGBUS where it became shorter. Windows does not let a mapped file
become shorter.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from ..digests.checksum import Checksum
from ..digests.digest import Digest, digest_storages
from ..errors import QMoveError, first_of
from . import pages
from .blocks import HostBlock, Released

log = logging.getLogger("qmove")

WINDOW = 16 << 20  # bytes that are read and checked at a time where no ring is
_SETTLED = 2 * 10**9  # nanoseconds after which a change has another time, on every file system

_Stamp = tuple[int, int, int]  # size, and times of the last change: of the content, of anything


class MappedFileChanged(QMoveError):
    """A file in which the weights of a parked model lie has other bytes now.

    The model stays parked.
    """

    def __init__(self, path: Path, names: Sequence[str], why: str) -> None:
        self.path, self.names = path, list(names)
        super().__init__(
            f"The file {path} was changed after weights of a parked model were left in it ({why}), "
            f"and they may be lost: {first_of(self.names)}. Nothing was moved. Write the old "
            "content into the file and try again, or load the model anew."
        )


@dataclass(slots=True)
class Part:
    """The bytes of one tensor in a file, as they were when they became a mirror.

    Attributes:
        digest: None where it was not taken yet.
        checksum: None until they are read for the first time.
        stamp: of the file when its bytes were last found right; None if that says too little.
        is_proved: whether what was last read through the map were these bytes.
    """

    name: str
    start: int
    end: int
    digest: Digest | None
    checksum: int | None
    stamp: _Stamp | None
    is_proved: bool = False


class MappedFile(HostBlock):
    """One file in memory. It lives as long as a storage over it, and then is unmapped.

    Attributes:
        is_own: whether qmove has written it (`disk_files.py`).

    Raises:
        OSError: it cannot be opened or mapped.
        ValueError: it is empty.
    """

    is_ram = False
    is_file = True
    is_own = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._reading = threading.Lock()
        self._direct = _open_past_cache(self._file)
        if self._direct is not None:
            weakref.finalize(self, os.close, self._direct)
        mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._memory = numpy.frombuffer(mapped, dtype=numpy.uint8)
        self.address = self._memory.ctypes.data
        self.nbytes = len(self._memory)
        self._parts: dict[int, Part] = {}  # by where they begin

    def memory(self) -> numpy.ndarray:
        """The whole file."""
        return self._memory

    def storage_of(
        self, name: str, start: int, end: int, released: Released
    ) -> tuple[torch.UntypedStorage, Digest | None]:
        """A storage over what the file has now in [start, end), and the digest of that.

        Takes as much RAM for a moment.

        Raises:
            MappedFileChanged: the file has become shorter.
        """
        stamp = self.stamp()
        content = self._content(name, start, end)
        digest = digest_storages([content.untyped_storage()])[0]
        checksum = Checksum(end - start).update(content).value
        self._parts[start] = Part(name, start, end, digest, checksum, stamp)
        return self.storage(start, end - start, released), digest

    def storage_known(
        self, name: str, start: int, end: int, checksum: int, released: Released, *, fresh: bool
    ) -> torch.UntypedStorage:
        """A storage over [start, end), of whose bytes only the checksum is known.

        Args:
            fresh: they were written just now; otherwise they are not relied on before they were
                read and compared.
        """
        stamp = self._status() if fresh else None
        self._parts[start] = Part(name, start, end, None, checksum, stamp)
        return self.storage(start, end - start, released)

    def note_content(self, name: str, start: int, end: int, *, now: bool) -> None:
        """Takes what the file has in [start, end), where a storage lies, for the bytes of that.

        Args:
            now: reads them, so that a change from now on is seen. Otherwise what is read first is
                what they are.

        Raises:
            MappedFileChanged: the file has become shorter.
        """
        part = Part(name, start, end, None, None, self.stamp())
        if now:
            part.checksum = self._checksum_in_file(part)
        self._parts[start] = part

    def part_at(self, start: int) -> Part:
        """The bytes that begin at `start`."""
        return self._parts[start]

    def shows(self, start: int) -> bool:
        """Whether the storage at `start` still has the bytes of the file: its owner has not written
        to them, or the same."""
        part = self._parts[start]
        if pages.is_unwritten(self.address + start, part.end - start):
            return True
        checksum = Checksum(part.end - start)
        for at in range(start, part.end, WINDOW):
            window = torch.empty(min(WINDOW, part.end - at), dtype=torch.uint8, device="cpu")
            self.read(at, window)
            checksum.update(window)
        return checksum.value == part.checksum

    def can_mirror(self, start: int, digest: Digest) -> bool:
        """Whether a storage at `start` that has this digest lies in the file, and not in pages that
        were written to."""
        part = self._parts[start]
        if part.digest is None and part.is_proved:
            part.digest = digest  # of what was just read, which were the bytes of the file
        return part.digest == digest

    def are_still_valid(self, starts: Sequence[int]) -> bool:
        """Whether the file still has the bytes of these storages. One that lacks some of them may
        just be written to: then none of them lies there safely."""
        try:
            for start in starts:
                self.require_unchanged(self._parts[start])
        except MappedFileChanged:
            log.info(
                "%s was changed: what was loaded from it is parked as any other weights", self.path
            )
            return False
        return True

    def require_unchanged(self, part: Part, *, has_other_bytes: bool = False) -> None:
        """Raises MappedFileChanged if the file has no longer the bytes of a part.

        Args:
            has_other_bytes: what was read through the map differs from them.
        """
        stamp = self.stamp()
        if not has_other_bytes and stamp is not None and stamp == part.stamp:
            return
        if self._checksum_in_file(part) != part.checksum:
            why = "its bytes are not those that were mapped"
            raise MappedFileChanged(self.path, [part.name], why)
        part.stamp = stamp

    def parts_in(self, start: int, end: int) -> list[Part]:
        """Those of which some lies in [start, end), in order."""
        found = (p for p in self._parts.values() if p.start < end and start < p.end)
        return sorted(found, key=lambda part: part.start)

    def read(self, start: int, window: torch.Tensor) -> None:
        """Copies what lies in the map from `start` on to `window`.

        Raises:
            MappedFileChanged: the file has become shorter.
        """
        end = start + len(window)
        self._require_size(end, start)
        if pages.read(self.address + start, window.numpy()) < len(window):
            self._require_size(end, start)  # says by how much

    def read_into(self, room: numpy.ndarray, start: int, end: int) -> numpy.ndarray:
        """Reads what the storages in [start, end) have now: from the file, or from the map what
        their owner has written to. Several threads may do so at once.

        Args:
            room: begins at a page, and has room for two pages more than that.

        Returns:
            The part of it where they are.

        Raises:
            MappedFileChanged: the file has become shorter.
            OSError: it cannot be read.
        """
        ahead = start % pages.PAGE  # so that the disk can write to it without a copy
        content = room[ahead : ahead + end - start]
        if not pages.is_unwritten(self.address + start, end - start):
            self.read(start, torch.from_numpy(content))
            return content
        aligned = room[: pages.round_to_pages(ahead + end - start)]
        try:
            if self._read_past_cache(start - ahead, aligned) < ahead + end - start:
                raise self._too_short([part.name for part in self.parts_in(start, end)])
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        return content

    def _read_past_cache(self, start: int, out: numpy.ndarray) -> int:
        """Reads from the page cache what is there, and the rest from the disk straight into `out`,
        where the file system does that; the bytes read. All is a multiple of a page."""
        done, into = 0, memoryview(out.data)
        if self._direct is not None:
            with contextlib.suppress(OSError):  # nothing is cached, or nobody can tell
                done = os.preadv(self._file.fileno(), [into], start, os.RWF_NOWAIT)
            done -= done % pages.PAGE
            with contextlib.suppress(OSError):  # what is wrong shows below
                while done < len(out) and not done % pages.PAGE:
                    count = os.preadv(self._direct, [into[done:]], start + done)
                    if not count:
                        return done
                    done += count
        return done + self._read_at(start + done, out[done:])

    def _content(self, name: str, start: int, end: int) -> torch.Tensor:
        """What is in the file now, whatever was written to the map."""
        content = numpy.empty(end - start, numpy.uint8)
        if self._read_at(start, content) < len(content):
            raise self._too_short([name])
        with torch.inference_mode(False):
            return torch.from_numpy(content)

    def _read_at(self, start: int, out: numpy.ndarray) -> int:
        """Reads what is in the file from `start` on, several threads at once; the bytes read."""
        done, into = 0, memoryview(out.data)
        while done < len(out):
            if hasattr(os, "preadv"):
                count = os.preadv(self._file.fileno(), [into[done:]], start + done)
            else:  # Windows has one place in the file for all threads
                with self._reading:
                    self._file.seek(start + done)
                    count = self._file.readinto(into[done:])
            if not count:
                break
            done += count
        return done

    def _checksum_in_file(self, part: Part) -> int:
        """Of what is in the file now, read in pieces."""
        checksum = Checksum(part.end - part.start)
        for at in range(part.start, part.end, WINDOW):
            checksum.update(self._content(part.name, at, min(part.end, at + WINDOW)))
        return checksum.value

    def _require_size(self, end: int, start: int) -> None:
        if os.fstat(self._file.fileno()).st_size < end:
            raise self._too_short([part.name for part in self.parts_in(start, end)])

    def _too_short(self, names: Sequence[str]) -> MappedFileChanged:
        size = os.fstat(self._file.fileno()).st_size
        why = f"it has {size} bytes now and had {self.nbytes}"
        return MappedFileChanged(self.path, names, why)

    def stamp(self) -> _Stamp | None:
        """Of the file now; None while a later change may have the same."""
        stamp = self._status()
        if stamp is None or not 0 <= max(stamp[1:]) < time.time_ns() - _SETTLED:
            return None
        return stamp

    def _status(self) -> _Stamp | None:
        if os.name != "posix":
            return None
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _open_past_cache(file: Any) -> int | None:
    """A descriptor of the same file whose reads leave the page cache out; None where there is
    none."""
    if not (hasattr(os, "O_DIRECT") and hasattr(os, "RWF_NOWAIT")):
        return None
    try:
        return os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT)
    except OSError:  # some file systems have no such reads, and some containers no /proc
        return None
