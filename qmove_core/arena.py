"""Host memory for parked bytes.

One anonymous memory map serves a whole park: it is sized exactly, and the system gets it back as soon as the last slice dies,
which a heap would not promise. Each storage is an object of its own over its slice, so that a parked model can be saved
and deep-copied without the rest of the arena.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable, Sequence

import numpy
import torch

ALIGNMENT = 64  # bytes; a cache line, and more than any dtype asks for

_blocks: dict[int, int] = {}  # bytes of each live block; no lock: a finalizer may run in the middle of anything


def allocate(sizes: Sequence[int], released: Callable[[int], None]) -> list[torch.UntypedStorage]:
    """One host storage of each size, in bytes, all zero. They can be read, written and saved, but not resized.

    Args:
        released: called with a storage's `_cdata` when that storage dies.

    Raises:
        MemoryError, OSError: the system refused.
    """
    if not sizes:
        return []
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += -(-size // ALIGNMENT) * ALIGNMENT
    block = numpy.frombuffer(mmap.mmap(-1, max(total, 1)), dtype=numpy.uint8)
    weakref.finalize(block, _blocks.pop, id(block), None)
    _blocks[id(block)] = total
    return [_storage_over(block[start : start + size], released) for start, size in zip(offsets, sizes, strict=True)]


def bytes_in_use() -> int:
    """Bytes of host memory that the arena holds now."""
    return sum(list(_blocks.values()))


def _storage_over(piece: numpy.ndarray, released: Callable[[int], None]) -> torch.UntypedStorage:
    storage = torch.from_numpy(piece).untyped_storage()
    # The storage keeps `piece` alive, and nothing else does: when `piece` dies the storage is gone.
    weakref.finalize(piece, released, storage._cdata)
    return storage
