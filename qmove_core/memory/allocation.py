"""Memory for storages on any device: all of them, or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from .. import homes
from ..actions import Action
from . import arena, budget


def allocate(
    action: Action, wanted: Sequence[tuple[int, torch.device]], device_advice: str
) -> list[torch.UntypedStorage]:
    """A storage for each (bytes, device), in order; those on the host lie in the arena.

    Raises:
        NotEnoughMemory: a device had no room after all, in pieces as large as these. Nothing stays
            allocated.
    """
    on_host = iter(
        arena.allocate([nbytes for nbytes, device in wanted if device.type == "cpu"], homes.forget)
    )
    storages: list[torch.UntypedStorage] = []
    try:
        for nbytes, device in wanted:
            if device.type == "cpu":
                storages.append(next(on_host))
            else:
                storages.append(
                    torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
                )
    except torch.OutOfMemoryError as error:
        storages.clear()  # whoever keeps the traceback keeps this frame
        raise budget.out_of_memory(
            action, device, bytes_by_device(wanted)[device], device_advice
        ) from error
    return storages


def bytes_by_device(wanted: Sequence[tuple[int, torch.device]]) -> dict[torch.device, int]:
    """The sum of the bytes on each device."""
    totals: dict[torch.device, int] = defaultdict(int)
    for nbytes, device in wanted:
        totals[device] += nbytes
    return totals
