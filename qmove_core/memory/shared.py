"""Host memory that several models share: their bytes once, and a private map of them for each.

Who has a parked tensor can write to it, in ways that nobody sees. So models never share a map:

- the bytes lie in a file without a name (`memfd`) that is written once and lives in RAM. Only the
  arena's own map of it is page-locked, and nobody but qmove ever has that one;
- each model's tensors look into a private map of the file. The kernel copies a page there when it
  is written to: what one writes, none of the others sees, in whatever way it is written.

A restore copies from the arena's map, as fast as from any other block, where the pages of the
model's own map were not written to. The kernel says so (`pages.is_unwritten`); where it does not,
the model's own map is read.

What it costs: pages that are written to become RAM of that model, which no figure counts. Linux
only; elsewhere each model has its own copy, as always.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Callable

import numpy
import torch

from ..digests.digest import Digest
from . import pages
from .blocks import Block, HostBlock


def is_possible() -> bool:
    """Whether this system has what sharing takes."""
    return sys.platform == "linux" and hasattr(os, "memfd_create")


class WrittenOnce(Block):
    """A block for bytes that models share. Whoever makes it writes it; nobody does after that, so
    it is not used for anything else either.

    Attributes:
        digests: of the bytes that begin there, where they are known.

    Raises:
        MemoryError, OSError: the system refused.
    """

    is_reusable = False

    def __init__(self, nbytes: int, emptied: Callable[[Block], None] | None = None) -> None:
        self._file = os.fdopen(os.memfd_create("qmove"), "w+b", buffering=0)
        weakref.finalize(self, self._file.close).atexit = False
        self._file.truncate(pages.round_to_pages(nbytes))
        memory = mmap.mmap(self._file.fileno(), max(nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.advise(
                numpy.frombuffer(memory, numpy.uint8).ctypes.data, nbytes, mmap.MADV_HUGEPAGE
            )
        self.digests: dict[int, Digest] = {}
        super().__init__(nbytes, emptied, memory)

    def private_map(self) -> mmap.mmap:
        """A new map of it, whose pages are copied when they are written to."""
        return mmap.mmap(self._file.fileno(), max(self.nbytes, 1), access=mmap.ACCESS_COPY)


class View(HostBlock):
    """What one model sees of a block that models share. It keeps that in use.

    Raises:
        MemoryError, OSError: the system refused.
    """

    is_ram = False

    def __init__(self, shared: WrittenOnce) -> None:
        self._shared, self._in_use = shared, shared.memory()
        self.nbytes = shared.nbytes
        self._memory = numpy.frombuffer(shared.private_map(), numpy.uint8)
        self.address = self._memory.ctypes.data
        self._ends: dict[int, int] = {}

    @property
    def ram(self) -> WrittenOnce:
        return self._shared

    def memory(self) -> numpy.ndarray:
        """The whole of it, as its model sees it."""
        return self._memory

    def storage(
        self, start: int, nbytes: int, released: Callable[[int], None]
    ) -> torch.UntypedStorage:
        """As in any block."""
        self._ends[start] = start + nbytes
        return super().storage(start, nbytes, released)

    def locked(self, start: int, end: int) -> torch.Tensor | None:
        """Those of the arena's map, unless the model has written to its own."""
        if pages.is_unwritten(self.address + start, end - start):
            return self._shared.locked(start, end)
        return None

    def can_mirror(self, start: int, digest: Digest) -> bool:
        """Whether the shared bytes have this digest: not, if the model has changed its own."""
        if self._shared.digests.get(start) == digest:
            return True
        return pages.is_unwritten(self.address + start, self._ends[start] - start)
