"""How much more host memory may be used: free RAM under every limit that holds here."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import readable_bytes
from . import pinning

# Bytes that a move leaves free: what Python, PyTorch and a driver take meanwhile.
HEADROOM = 64 << 20

SHARE = 0.05  # of what may be used: what is kept free for others
ENOUGH = 2 << 30  # bytes to keep free, however small that share is
SMALL_SHARE = 1 / 8  # unless they would be more than this share: of 4 GiB 512 MiB are kept free


@dataclass(frozen=True)
class Limit:
    """Bytes still free under one limit, and what that limit is called."""

    free: int
    name: str


def host_limits(ram_limit: int | None, arena_bytes: int) -> list[Limit]:
    """Every limit on more host memory, the tightest first.

    Args:
        ram_limit: bytes that qmove may use in all (`qmove.configure(ram_limit=...)`), None for no
            limit of its own.
        arena_bytes: bytes that qmove uses now.
    """
    limits = _limits_of_the_system()
    if ram_limit is not None:
        limits.append(_own_limit(ram_limit, arena_bytes))
    return sorted(limits, key=lambda limit: limit.free)


def room(ram_limit: int | None, arena_bytes: int) -> Limit:
    """What a move may take, by the tightest of `host_limits`.

    Of the system's own limits it leaves `HEADROOM`: who passes them is killed, or cannot even start
    a thread. Of RAM it leaves more, `stays_free`. So what is free may be less than 0.
    """
    less = f", less {HEADROOM >> 20} MiB that stay free"
    limits = [Limit(limit.free - HEADROOM, limit.name + less) for limit in _limits_of_the_system()]
    reserved = stays_free()
    if reserved > HEADROOM:
        less = f", less {readable_bytes(reserved)} that stay free beside page-locked memory"
        limits.append(Limit(psutil.virtual_memory().available - reserved, _RAM + less))
    if ram_limit is not None:
        limits.append(_own_limit(ram_limit, arena_bytes))
    return min(limits, key=lambda limit: limit.free)


def stays_free() -> int:
    """Bytes of the system's available RAM that a move leaves free: `reserve` of it where what it
    takes will be page-locked, which no system can swap out or take back; otherwise `HEADROOM`."""
    if not pinning.is_possible():
        return HEADROOM
    return max(HEADROOM, reserve(psutil.virtual_memory().total))


def reserve(total: int) -> int:
    """Bytes that are to stay free for others under a limit of `total` bytes: 5 %, and 2 GiB or an
    eighth at least."""
    return max(int(total * SHARE), min(ENOUGH, int(total * SMALL_SHARE)))


def _own_limit(ram_limit: int, arena_bytes: int) -> Limit:
    return Limit(max(0, ram_limit - arena_bytes), "ram_limit of qmove.configure")


def _limits_of_the_system() -> list[Limit]:
    limits = [Limit(psutil.virtual_memory().available, _RAM), *_limits_of_the_process()]
    commit = commit_free()
    if commit is not None:
        limits.append(Limit(commit, "commit limit of Windows: RAM and page file"))
    cgroup = cgroup_free()
    if cgroup is not None:
        limits.append(Limit(cgroup, "cgroup limit"))
    return limits


_RAM = "available RAM"


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of Windows."""

    _fields_ = (
        ("dwLength", ctypes.c_uint32),
        ("dwMemoryLoad", ctypes.c_uint32),
        ("ullTotalPhys", ctypes.c_uint64),
        ("ullAvailPhys", ctypes.c_uint64),
        ("ullTotalPageFile", ctypes.c_uint64),
        ("ullAvailPageFile", ctypes.c_uint64),
        ("ullTotalVirtual", ctypes.c_uint64),
        ("ullAvailVirtual", ctypes.c_uint64),
        ("ullAvailExtendedVirtual", ctypes.c_uint64),
    )


def commit_free(kernel32: Any = None) -> int | None:
    """Bytes that this process may still commit on Windows, which promises no memory that neither
    RAM nor the page file has room for. None on other systems, and where Windows does not say.

    Args:
        kernel32: the library to ask; None: that of Windows.
    """
    if kernel32 is None:
        if sys.platform != "win32":
            return None
        kernel32 = ctypes.windll.kernel32
    status = _MemoryStatus(dwLength=ctypes.sizeof(_MemoryStatus))
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.ullAvailPageFile)


def _limits_of_the_process() -> list[Limit]:
    """Those of `ulimit -v` and `ulimit -d`. Other systems than Linux have none that holds."""
    if sys.platform != "linux":
        return []
    import resource

    kinds = [
        (resource.RLIMIT_AS, "vms", "limit on address space, ulimit -v"),
        (resource.RLIMIT_DATA, "data", "limit on data, ulimit -d"),
    ]
    limits = []
    for kind, used, name in kinds:
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY:
            now = getattr(psutil.Process().memory_info(), used)
            limits.append(Limit(max(0, allowed - now), name))
    return limits


def total_ram() -> int:
    """Bytes of RAM that this process could have: the machine's, or its cgroups' limit where that is
    less."""
    return min([psutil.virtual_memory().total, *(limit for limit, _free in _cgroup_limits())])


def cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes free under the tightest memory limit of this process's cgroups (v2 or v1); None without
    one."""
    return min((free for _limit, free in _cgroup_limits(root, membership)), default=None)


def _cgroup_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[int, int]]:
    """Each memory limit of this process's cgroups in bytes, and what is free under it.

    A limit can sit on any ancestor, and the page cache that counts as used is given back under
    pressure, so it is free.
    Source: the kernel's admin-guide/cgroup-v2.rst (`memory.max`, `memory.current`, `inactive_file`
    in `memory.stat`).
    """
    if not membership.exists():  # not Linux
        return
    for line in membership.read_text().splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = (
                root / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            figures = _limit_in(folder, *names)
            if figures is not None:
                yield figures
            if folder == base:
                break


def _limit_in(
    folder: Path, limit_file: str, usage_file: str, reclaimable: str
) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        usage = int((folder / usage_file).read_text())
        stat = (folder / "memory.stat").read_text()
    except OSError:  # the root group has no limit files, and a container may see only its own group
        return None
    if limit == "max" or int(limit) >= psutil.virtual_memory().total:
        return None
    cached = next(
        (int(line.split()[1]) for line in stat.splitlines() if line.split()[0] == reclaimable), 0
    )
    return int(limit), max(0, int(limit) - usage + cached)
