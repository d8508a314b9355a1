"""What `qmove.configure` sets, for the whole process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Settings:
    """Attributes:
    ram_limit: bytes of host memory that parked models may take in all; None for no limit of qmove's own.
    """

    ram_limit: int | None = None


settings = Settings()


def configure(*, ram_limit: int | None = None) -> None:
    """Sets qmove's limits for this process.

    Args:
        ram_limit: bytes of host memory that parked models may take in all. None: as much as RAM and cgroup allow.

    Raises:
        ValueError: a negative limit.
    """
    if ram_limit is not None and ram_limit < 0:
        raise ValueError(f"ram_limit is a number of bytes, not {ram_limit}; None means no limit of qmove's own.")
    settings.ram_limit = ram_limit
