"""Host memory of the arena for tests: storages in blocks, and what the system says about them."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

import simcuda
from qmove_core.memory import arena, blocks

MIB = 1 << 20


def nothing(_cdata: int) -> None:
    """For storages whose death nobody waits for."""


def pinned_storage(nbytes: int) -> tuple[torch.UntypedStorage, blocks.Block]:
    """One storage in a block of its own, all of it pinned."""
    (storage,) = arena.allocate([nbytes], nothing)
    block = block_of(storage)
    assert block.pin(0, block.nbytes)
    return storage, block


def block_of(storage: torch.UntypedStorage) -> blocks.Block:
    place = blocks.place_of(storage)
    assert place is not None and isinstance(place[0], blocks.Block)
    return place[0]


def wait_until_prepared() -> None:
    """Returns when nothing is being pinned in the background."""
    for thread in threading.enumerate():
        if thread.name == "qmove-prepare":
            thread.join()


def is_mapped(address: int) -> bool:
    """Whether this process has memory there; from the kernel's own list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def operator_works() -> bool:
    return simcuda.last_error() == 0 and torch.ones(3, device="cuda").sum().item() == 3
