"""What may be used: free RAM under every limit that holds here, and free VRAM.

Asked before the first byte moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .. import devices, hosting
from ..actions import Action
from ..errors import NotEnoughDeviceMemory, NotEnoughMemory
from ..settings import settings
from . import arena, giving_back


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


def require(
    action: Action,
    needed: Mapping[torch.device, int],
    host_advice: str = "",
    device_advice: str = "",
) -> None:
    """Raises NotEnoughMemory if the bytes needed on some device do not fit there; on the host
    qmove's own limit counts too."""
    for device, nbytes in needed.items():
        if device.type == "cpu":
            require_host(
                action, 0 if arena.spare_for(nbytes) else nbytes, settings.ram_limit, host_advice
            )
        else:
            require_device(action, nbytes, device, device_advice)


def require_host(action: Action, nbytes: int, ram_limit: int | None, advice: str = "") -> None:
    """Raises NotEnoughMemory if `nbytes` more of host memory would pass a limit.

    What qmove holds there only to be faster next time is given back first, as far as it is needed.
    """
    tightest = host_limits(ram_limit, arena.bytes_held())[0]
    if nbytes > tightest.free and giving_back.trim(nbytes - tightest.free):
        tightest = host_limits(ram_limit, arena.bytes_held())[0]
    if nbytes > tightest.free:
        advice = (
            advice
            or "Restore or delete another parked model, close other programs, or raise the limit "
            "named."
        )
        raise NotEnoughMemory(action, "cpu", nbytes, tightest.free, tightest.name, advice)


def require_device(action: Action, nbytes: int, device: torch.device, advice: str = "") -> None:
    """Raises NotEnoughMemory if `nbytes` do not fit on `device`."""
    free = devices.free_memory(device)
    if free is not None and nbytes > free:
        advice = (
            advice
            or "Park another model first, or choose another device: qmove.restore(model, "
            "device=...)."
        )
        raise NotEnoughDeviceMemory(action, str(device), nbytes, free, "free VRAM", advice)


def make_room(needed: Mapping[torch.device, int]) -> bool:
    """Asks the host of this program for room on the accelerators that have too little.

    It may park models for it: a plan that was made before must be made again.

    Returns:
        Whether it was asked.
    """
    lacking = {
        device: nbytes
        for device, nbytes in needed.items()
        if device.type != "cpu" and not has_room({device: nbytes})
    }
    for device, nbytes in lacking.items():
        hosting.ask_for_room(device, nbytes)
    return bool(lacking)


def has_room(needed: Mapping[torch.device, int]) -> bool:
    """Whether the bytes needed on each accelerator are free there now."""
    return all(
        (free := devices.free_memory(device)) is None or nbytes <= free
        for device, nbytes in needed.items()
    )


def has_room_on_host(nbytes: int) -> bool:
    """Whether `nbytes` more of host memory are free under every limit now."""
    return nbytes <= host_limits(settings.ram_limit, arena.bytes_held())[0].free


def out_of_memory(
    action: Action, device: torch.device, needed: int, advice: str
) -> NotEnoughMemory:
    """The error for an allocation that failed although the figures said that it fits: what is free
    lies in pieces."""
    free = devices.free_memory(device) or 0
    return NotEnoughDeviceMemory(action, str(device), needed, free, "free VRAM, in pieces", advice)


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
