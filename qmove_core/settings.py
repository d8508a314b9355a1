"""What `qmove.configure` sets, for the whole process."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass
class Settings:
    """The settings of this process; `configure` describes them."""

    ram_limit: int | None = None
    keep_mirrors: bool = True
    verify: bool = False
    pin_limit: int | None = None
    share_from: int | None = 16 << 20
    disk_folder: Path | None = None


settings = Settings()

_UNCHANGED: Any = object()


def configure(
    *,
    ram_limit: int | None = _UNCHANGED,
    keep_mirrors: bool = _UNCHANGED,
    verify: bool = _UNCHANGED,
    pin_limit: int | None = _UNCHANGED,
    share_from: int | None = _UNCHANGED,
    disk_folder: str | os.PathLike[str] | None = _UNCHANGED,
) -> Settings:
    """Sets how qmove works in this process. What is not given stays as it is.

    Args:
        ram_limit: bytes of host memory that qmove may take in all, mirrors included. None: as much
            as RAM and cgroup allow.
        keep_mirrors: keep the host copy of a restored model (its bytes in RAM), so that parking it
            again copies only the storages that changed. It is freed when RAM gets short, the least
            recently used first.
        verify: in each restore compare the digests of what was parked and what came back, before
            the model is used.
        pin_limit: bytes of host memory that may be page-locked, which makes copies fast. None: what
            the system allows. 0: none.
        share_from: bytes that a model which is parked must have in common with one that is in host
            memory already, for the two to share them there (Linux only). None: never.
        disk_folder: where `park(model, to="disk")` writes, a folder on a fast disk of this machine.
            It is made when it is first used; the one above it must be there. Files that processes
            have left there which ended without cleaning up are removed. None: nowhere.

    Returns:
        A copy of the settings that now hold.

    Raises:
        ValueError: a negative limit. Nothing was set.
    """
    limits = (("ram_limit", ram_limit), ("pin_limit", pin_limit), ("share_from", share_from))
    for name, limit in limits:
        if limit is not _UNCHANGED and limit is not None and limit < 0:
            raise ValueError(
                f"{name} is a number of bytes, not {limit}; None means no limit of qmove's own."
            )
    given: dict[str, Any] = {
        "ram_limit": ram_limit,
        "keep_mirrors": keep_mirrors,
        "verify": verify,
        "pin_limit": pin_limit,
        "share_from": share_from,
        "disk_folder": disk_folder,
    }
    if disk_folder is not _UNCHANGED and disk_folder is not None:
        given["disk_folder"] = Path(disk_folder).absolute()
    for name, value in given.items():
        if value is not _UNCHANGED:
            setattr(settings, name, value)
    return replace(settings)
