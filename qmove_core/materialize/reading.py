"""Brings the bytes of offloaded weights into memory: each file once and in its own order, several stretches at a time.

Files are read through memory maps. The system is told what comes next, so that it reads far ahead in large pieces; touching
the pages then finds them there.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from ..digests.checksum import checksum_of
from ..integrations.weights_map import Source
from ..transfer.copies import Progress

CHUNK = 64 << 20  # bytes between two looks at whether to stop; the same again is read ahead
STRETCH = (
    256 << 20
)  # bytes that one thread reads at a time; neighbours in a file, so that the disk reads on
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(slots=True)
class Read:
    """One tensor to bring into memory.

    Attributes:
        source: where its data lies.
        opened: the tensor there, as `source.open()` gave it.
        into: a tensor of the model's dtype to copy it to; None to leave it where it is, with its pages in memory.
        wants_digest, digest: whether to take the digest of what the model gets, and that digest.
    """

    source: Source
    opened: torch.Tensor
    into: torch.Tensor | None
    wants_digest: bool = False
    digest: int | None = None

    @property
    def nbytes(self) -> int:
        return self.source.nbytes


def read(reads: Sequence[Read], progress: Progress | None = None) -> None:
    """Carries out all of `reads`. What `progress` raises stops them.

    Args:
        progress: called in the calling thread as (bytes done, bytes in all).
    """
    counter = _Counter(sum(item.nbytes for item in reads), progress)
    ordered = sorted(reads, key=lambda item: (str(item.source.file or ""), item.source.offset))
    on_host = [item for item in ordered if item.into is None or item.into.device.type == "cpu"]
    with ThreadPoolExecutor(WORKERS, "qmove-read") as pool:
        pending: set[Future[None]] = {
            pool.submit(_read_stretch, part, counter) for part in _stretches(on_host)
        }
        try:
            # Copies to a device go through one thread: its link is the bottleneck, and the order of streams stays simple.
            for part in _stretches(
                [
                    item
                    for item in ordered
                    if item.into is not None and item.into.device.type != "cpu"
                ]
            ):
                _read_stretch(part, counter, counter.report)
            while pending:
                done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
                counter.report()
                for future in done:
                    future.result()
        except BaseException:
            counter.stopped = True
            raise
    counter.report()


class _Counter:
    """Bytes read so far, counted by several threads and reported by one."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.stopped = False
        self._total, self._progress = total, progress
        self._done, self._reported = 0, -1
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def report(self) -> None:
        if self._progress is not None and self._done != self._reported:
            self._reported = self._done
            self._progress(self._reported, self._total)


def _stretches(reads: Iterable[Read]) -> list[list[Read]]:
    stretches: list[list[Read]] = []
    size = STRETCH
    for item in reads:
        if size >= STRETCH:
            stretches.append([])
            size = 0
        stretches[-1].append(item)
        size += item.nbytes
    return stretches


def _read_stretch(
    reads: Sequence[Read], counter: _Counter, report: Callable[[], None] = lambda: None
) -> None:
    with torch.no_grad(), torch.inference_mode(False):
        for item, following in zip(reads, [*reads[1:], None], strict=True):
            if item.source.file is not None:
                _read_ahead(item.opened, 0)
                if following is not None and item.nbytes < CHUNK:
                    _read_ahead(following.opened, 0)
            _read_one(item, counter, report)
            report()
            if counter.stopped:
                return


def _read_one(item: Read, counter: _Counter, report: Callable[[], None]) -> None:
    source, into = item.opened, item.into
    as_it_is = into is None or (
        source.dtype == into.dtype and item.source.through in (None, source.dtype)
    )
    if as_it_is and source.is_contiguous() and (into is None or into.is_contiguous()):
        pieces = _bytes_of(source).split(CHUNK)
        places = _bytes_of(into).split(CHUNK) if into is not None else [None] * len(pieces)
        for index, (piece, place) in enumerate(zip(pieces, places, strict=True)):
            if item.source.file is not None:
                _read_ahead(source, (index + 1) * CHUNK)
            if place is not None:
                place.copy_(piece)
            elif item.source.file is not None:
                piece[:: mmap.PAGESIZE].sum()  # touches every page
            counter.add(piece.numel())
            report()
            if counter.stopped:
                return
    elif into is not None:
        into.copy_(item.source.cast(source))
        counter.add(item.nbytes)
    if item.wants_digest:
        item.digest = checksum_of(source if into is None else into)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _read_ahead(tensor: torch.Tensor, start: int) -> None:
    """Asks the system to read the next CHUNK bytes of a mapped tensor. Only a hint: without it reading is slower, not wrong."""
    madvise = _madvise()
    nbytes = min(tensor.numel() * tensor.itemsize - start, CHUNK)
    if madvise is not None and nbytes > 0:
        first = (tensor.data_ptr() + start) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(
            ctypes.c_void_p(first),
            ctypes.c_size_t(tensor.data_ptr() + start + nbytes - first),
            mmap.MADV_WILLNEED,
        )


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
