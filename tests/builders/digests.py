"""What digests have found out about devices."""

from __future__ import annotations

from qmove_core.digests import choosing


def try_out_anew() -> None:
    """Devices are tried out again, as in a new process."""
    choosing._chosen.clear()
    choosing._failed.clear()
    choosing._said.clear()
