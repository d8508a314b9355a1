"""Reads offloaded weights into memory: each file once and in its own order, several at a time.

Files are read through memory maps. The system is asked for what comes next, so that it reads far
ahead in large blocks; touching the pages then finds them in memory. To touch a page of a file that
has become shorter ends the process (SIGBUS): so its size is looked at before each chunk, and the
bytes are read by the kernel (`pages.read`), which reports it.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from ..digests.checksum import checksum_of
from ..errors import QMoveError
from ..memory import pages
from ..transfer.copies import Progress
from .plan import TensorPlan

_WILLNEED = 3  # MADV_WILLNEED of Linux; Windows has no such name


class FileCutShort(QMoveError):
    """A file became shorter while a model was read from it. Nothing was changed."""

    def __init__(self, file: Path) -> None:
        super().__init__(
            f"The file {file} has become shorter while weights were read from it: nothing was "
            "changed. Write the whole file again and try again."
        )


def read(
    plans: Iterable[TensorPlan],
    progress: Progress | None = None,
    *,
    checksums: bool = False,
    chunk: int = 64 << 20,
    stretch: int = 256 << 20,
    workers: int = min(8, os.cpu_count() or 1),
) -> None:
    """Reads all `plans` into their `data`; or into the page cache, where they are mapped.

    Args:
        progress: called in the calling thread as (bytes done, bytes in all). What it raises stops
            the reading.
        checksums: whether to take the checksum of what the model gets.
        chunk: bytes between two looks at whether to stop; the same again is read ahead.
        stretch: bytes that one thread reads at a time, neighbours in a file: the disk reads on.
        workers: threads that read into host memory.
    """
    ordered = sorted(plans, key=lambda item: (str(item.source.file or ""), item.source.offset))
    counter = _Counter(sum(item.source.nbytes for item in ordered), progress, checksums, chunk)
    on_host = [item for item in ordered if item.data is None or item.data.device.type == "cpu"]
    to_device = [
        item for item in ordered if item.data is not None and item.data.device.type != "cpu"
    ]
    with ThreadPoolExecutor(workers, "qmove-read") as pool:
        pending: set[Future[None]] = {
            pool.submit(_read_stretch, members, counter) for members in _stretches(on_host, stretch)
        }
        try:
            # Copies to a device go through one thread: its link is the bottleneck, and the order of
            # streams stays simple.
            for members in _stretches(to_device, stretch):
                _read_stretch(members, counter, counter.report)
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

    def __init__(self, total: int, progress: Progress | None, checksums: bool, chunk: int) -> None:
        self.stopped, self.checksums, self.chunk = False, checksums, chunk
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


def _stretches(plans: Iterable[TensorPlan], length: int) -> list[list[TensorPlan]]:
    stretches: list[list[TensorPlan]] = []
    size = length
    for item in plans:
        if size >= length:
            stretches.append([])
            size = 0
        stretches[-1].append(item)
        size += item.source.nbytes
    return stretches


def _read_stretch(
    plans: Sequence[TensorPlan], counter: _Counter, report: Callable[[], None] = lambda: None
) -> None:
    with torch.no_grad(), torch.inference_mode(False):
        for item, following in zip(plans, [*plans[1:], None], strict=True):
            if item.source.file is not None:
                _read_ahead(item.opened, 0, counter.chunk)
                if following is not None and item.source.nbytes < counter.chunk:
                    _read_ahead(following.opened, 0, counter.chunk)
            _read_one(item, counter, report)
            report()
            if counter.stopped:
                return


def _read_one(item: TensorPlan, counter: _Counter, report: Callable[[], None]) -> None:
    opened, data = item.opened, item.data
    as_it_is = data is None or (
        opened.dtype == data.dtype and item.source.through in (None, opened.dtype)
    )
    if as_it_is and opened.is_contiguous() and (data is None or data.is_contiguous()):
        parts = _bytes_of(opened).split(counter.chunk)
        places = _bytes_of(data).split(counter.chunk) if data is not None else [None] * len(parts)
        on_the_way = torch.empty(0, dtype=torch.uint8, device="cpu")
        for index, (part, place) in enumerate(zip(parts, places, strict=True)):
            file = item.source.file
            if file is not None:
                _require_size(item, index * counter.chunk + part.numel())
                _read_ahead(opened, (index + 1) * counter.chunk, counter.chunk)
            if place is not None and file is not None:
                if place.device.type == "cpu":
                    _read_mapped(file, part, place)
                else:
                    if on_the_way.numel() < part.numel():
                        on_the_way = torch.empty(part.numel(), dtype=torch.uint8, device="cpu")
                    place.copy_(_read_mapped(file, part, on_the_way[: part.numel()]))
            elif place is not None:
                place.copy_(part)
            elif file is not None:
                part[:: mmap.PAGESIZE].sum()  # touches every page
            counter.add(part.numel())
            report()
            if counter.stopped:
                return
    elif data is not None:
        _require_size(item, item.source.nbytes)
        if item.source.file is not None and opened.is_contiguous():
            copied = torch.empty_like(opened)
            _read_mapped(item.source.file, _bytes_of(opened), _bytes_of(copied))
            opened = copied
        data.copy_(item.source.cast(opened))
        counter.add(item.source.nbytes)
    if counter.checksums:
        item.checksum = checksum_of(opened if data is None else data)


def _read_mapped(file: Path, part: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Reads bytes of a mapped file into `out`, flat uint8 on the host, and returns that."""
    if pages.read(part.data_ptr(), out.numpy()) < part.numel():
        raise FileCutShort(file)
    return out


def _require_size(item: TensorPlan, end: int) -> None:
    """Raises FileCutShort if the file has no longer the first `end` bytes of a tensor."""
    file = item.source.file
    if file is None:
        return
    try:
        size = file.stat().st_size
    except OSError:  # deleted or moved: the map still has all of it
        return
    if size < item.source.offset + end:
        raise FileCutShort(file)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _read_ahead(tensor: torch.Tensor, start: int, most: int) -> None:
    """Asks the system to read the next bytes of a mapped tensor ahead. Only a hint."""
    nbytes = min(tensor.numel() * tensor.itemsize - start, most)
    if nbytes > 0:
        address = tensor.data_ptr() + start
        first = address // mmap.PAGESIZE * mmap.PAGESIZE
        pages.advise(first, address + nbytes - first, _WILLNEED)
