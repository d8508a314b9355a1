"""What `qmove.configure` sets, for the whole process."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass
class Settings:
    """Attributes:
    ram_limit: bytes of host memory that qmove may take in all, mirrors included; None for no limit of qmove's own.
    keep_mirrors: whether a restored model's host copy is kept, so that parking it again copies only what has changed.
    verify: whether each restore compares digests before the model is used.
    pin_limit: bytes of host memory that may be page-locked; None for what the system allows, 0 for none.
    """

    ram_limit: int | None = None
    keep_mirrors: bool = True
    verify: bool = False
    pin_limit: int | None = None


settings = Settings()

_UNCHANGED: Any = object()


def configure(
    *,
    ram_limit: int | None = _UNCHANGED,
    keep_mirrors: bool = _UNCHANGED,
    verify: bool = _UNCHANGED,
    pin_limit: int | None = _UNCHANGED,
) -> Settings:
    """Sets how qmove works in this process. What is not named stays as it is.

    Args:
        ram_limit: bytes of host memory that qmove may take in all. None: as much as RAM and cgroup allow.
        keep_mirrors: keep the host copy of a restored model (its bytes in RAM), so that parking it again copies only the
            storages that changed. It is given back when RAM gets short, the least recently used first.
        verify: compare the digests of what was parked and what came back in each restore, before the model is used.
        pin_limit: bytes of host memory that may be page-locked, which is what makes copies fast. None: what the system allows.

    Returns:
        The settings that now hold.

    Raises:
        ValueError: a negative limit.
    """
    given: dict[str, Any] = {
        "ram_limit": ram_limit,
        "keep_mirrors": keep_mirrors,
        "verify": verify,
        "pin_limit": pin_limit,
    }
    changes = {name: value for name, value in given.items() if value is not _UNCHANGED}
    for name in ("ram_limit", "pin_limit"):
        limit = changes.get(name)
        if limit is not None and limit < 0:
            raise ValueError(
                f"{name} is a number of bytes, not {limit}; None means no limit of qmove's own."
            )
    wanted = replace(settings, **changes)
    for field in fields(settings):
        setattr(settings, field.name, getattr(wanted, field.name))
    return wanted
