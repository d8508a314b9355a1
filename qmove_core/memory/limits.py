"""How much more host memory may be used: free RAM under every limit that holds here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil


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
    limits = [Limit(psutil.virtual_memory().available, "available RAM")]
    cgroup = cgroup_free()
    if cgroup is not None:
        limits.append(Limit(cgroup, "cgroup limit"))
    if ram_limit is not None:
        limits.append(Limit(max(0, ram_limit - arena_bytes), "ram_limit of qmove.configure"))
    return sorted(limits, key=lambda limit: limit.free)


def cgroup_free(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Bytes free under the tightest memory limit of this process's cgroups (v2 or v1); None without
    one.

    A limit can sit on any ancestor, and the page cache that counts as used is given back under
    pressure, so it is free.
    Source: the kernel's admin-guide/cgroup-v2.rst (`memory.max`, `memory.current`, `inactive_file`
    in `memory.stat`).
    """
    if not membership.exists():  # not Linux
        return None
    tightest: int | None = None
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
            free = _free_in(folder, *names)
            if free is not None and (tightest is None or free < tightest):
                tightest = free
            if folder == base:
                break
    return tightest


def _free_in(folder: Path, limit_file: str, usage_file: str, reclaimable: str) -> int | None:
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
    return max(0, int(limit) - usage + cached)
