"""Files that parked weights are written to: made, found again, and removed when nobody needs them.

A file is a safetensors file. Each storage is a tensor of bytes in it, at a multiple of 64; what the
storages are is text in its header (`disk_manifest.py`), with a checksum of each.

- A file that is to stay is written beside, under a name that nobody reads, synced, and renamed when
  it is whole: whoever looks finds the old one or the new one. The header comes last, so that what
  was only begun is no safetensors file either.
- A temporary file is this process's own, has a name that says so, and goes with the last storage
  over it, at the latest with the process.
- While one is written or used it is locked (`flock`; Windows keeps what is open from being
  removed). A file with such a name that nobody has locked was left by a process that is gone:
  `remove_leftovers`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .blocks import ALIGNMENT
from .mapped_files import MappedFile

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment,unused-ignore]

WEIGHTS = "weights.safetensors"  # of a folder that a model is parked in to stay
_BEGUN, _TEMPORARY = "partial", "parked"
_OURS = re.compile(rf"qmove-[0-9a-f]{{16}}\.(?:{_BEGUN}|{_TEMPORARY})")
_PAGE = 4096  # the bytes of the first storage begin at a multiple of it


class DiskFile(MappedFile):
    """A file that qmove has written, mapped into memory.

    Args:
        is_temporary: it is removed when no storage lies in it any more.

    Raises:
        OSError, ValueError: it cannot be opened, locked or mapped.
    """

    is_own = True

    def __init__(self, path: Path, *, is_temporary: bool = False) -> None:
        self.is_temporary = is_temporary
        super().__init__(path)
        lock(self._file)
        if is_temporary:
            weakref.finalize(self, _remove_own, path, os.getpid())

    def is_still_at(self, path: Path) -> bool:
        """Whether this is the file that has this name now."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except OSError:
            return False


def _remove_own(path: Path, pid: int) -> None:
    """At the end of a file, in the middle of anything. A forked child leaves its parent's alone."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):  # its folder is gone; or the next process removes it
            path.unlink()


class DiskWriter:
    """Writes one file: each storage at its place, then the header, then `finish`.

    Use it in a `with`: what is not finished is removed.

    Attributes:
        path: of what is being written.
        starts: where each storage begins in the file.
        nbytes: of the whole file.

    Args:
        folder: where; made if the one above it is there.
        sizes: bytes of each storage.
        header_bytes: the most that the text in the header will take.
        name: of the file to stay; None: a temporary one.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(
        self, folder: Path, sizes: Sequence[int], header_bytes: int, name: str | None
    ) -> None:
        make_folder(folder)
        self._target = None if name is None else folder / name
        self._sizes = sizes
        self._rooms = [max(1, -(-size // ALIGNMENT)) * ALIGNMENT for size in sizes]
        entries = sum(len(_entry(i, 10**18, 2 * 10**18)) + 2 for i in range(len(sizes)))
        self._data = -(-(8 + header_bytes + entries + 2) // _PAGE) * _PAGE
        self.starts: list[int] = []
        self.nbytes = self._data
        for room in self._rooms:
            self.starts.append(self.nbytes)
            self.nbytes += room
        self.path, self._file = _make(folder, _TEMPORARY if name is None else _BEGUN)

    def __enter__(self) -> DiskWriter:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        self._file.close()
        if kind is not None:
            with contextlib.suppress(OSError):  # it was renamed, or its folder is gone
                self.path.unlink()

    def write(self, at: int, content: memoryview) -> None:
        """Writes bytes at a place in the file.

        Raises:
            OSError: the disk is full, a limit is reached, ...
        """
        self._file.seek(at)
        while len(content):
            content = content[write(self._file, content) :]

    def finish(self, metadata: bytes) -> DiskFile:
        """Writes the header with this text (JSON of an object of strings), syncs, gives the file
        its name, and maps it.

        Raises:
            OSError, ValueError: the disk is full, somebody else has the file open on Windows, ...
        """
        entries = [
            _entry(index, start - self._data, start - self._data + room)
            for index, (start, room) in enumerate(zip(self.starts, self._rooms, strict=True))
        ]
        header = b"{" + b",".join([b'"__metadata__":' + metadata, *entries]) + b"}"
        self._file.truncate(self.nbytes)
        self.write(8, memoryview(header.ljust(self._data - 8)))
        self.write(0, memoryview((self._data - 8).to_bytes(8, "little")))
        sync(self._file.fileno())
        if self._target is None:
            return DiskFile(self.path, is_temporary=True)
        self._file.close()  # Windows renames no open file
        rename(self.path, self._target)
        _sync_folder(self._target.parent)
        return DiskFile(self._target)


def room_in(folder: Path) -> int | None:
    """Bytes free on the disk of a folder, or of the one above it; None where nobody can tell."""
    for place in (folder, folder.parent):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(place).free
    return None


def make_folder(folder: Path) -> None:
    """Makes a folder, if the one above it is there.

    Raises:
        OSError: it is not, or the folder cannot be made.
    """
    folder.mkdir(exist_ok=True)


def entry_name(index: int) -> str:
    """The name in the file of the storage with this number."""
    return str(index)


def remove_leftovers(folder: Path) -> list[Path]:
    """Removes what processes have left in a folder that are gone. Never what one that lives is
    using, and nothing that was meant to stay.

    Returns:
        What was removed.
    """
    removed = []
    try:
        found = [entry for entry in folder.iterdir() if _OURS.fullmatch(entry.name)]
    except OSError:
        return []
    for path in found:
        with contextlib.suppress(OSError):  # another process has removed it, or it is open
            if stat.S_ISREG(path.lstat().st_mode) and _is_left(path):
                path.unlink()
                removed.append(path)
    return removed


def _is_left(path: Path) -> bool:
    if fcntl is None:
        return True  # what is open cannot be removed
    # Not through a link that was put there meanwhile, and not waiting for a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def lock(file: Any) -> None:
    """Shows other processes that a file is in use, until it is closed."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: nothing is removed there
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)


def _make(folder: Path, ending: str) -> tuple[Path, Any]:
    """A new file of this process, locked. One that is taken for a leftover before it is locked is
    made anew, under another name."""
    while True:
        path = folder / f"qmove-{secrets.token_hex(8)}.{ending}"
        file = path.open("x+b", buffering=0)
        lock(file)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return path, file
        file.close()


def _entry(index: int, start: int, end: int) -> bytes:
    return (
        f'"{entry_name(index)}":{{"dtype":"U8","shape":[{end - start}],'
        f'"data_offsets":[{start},{end}]}}'
    ).encode()


def _sync_folder(folder: Path) -> None:
    """The new name is on the disk then, too."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


# What changes a disk, in one place: tests end the process before and after each of these.


def write(file: Any, content: memoryview) -> int:
    """Writes some of the bytes, and says how many."""
    return int(file.write(content[:_MOST]))


def sync(descriptor: int) -> None:
    os.fsync(descriptor)


def rename(path: Path, target: Path) -> None:
    os.replace(path, target)


_MOST = 16 << 20
