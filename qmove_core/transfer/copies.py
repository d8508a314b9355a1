"""Copies whole storages between devices and the host, as bytes.

Each direction of each device has a stream of its own, so that copies overlap with each other and
with what the model computes. Host memory is page-locked piece by piece just ahead of the copies,
which hides one behind the other; where it cannot be, the bytes pass through a small ring of locked
slots (`memory/ring.py`), which is as asynchronous. Small storages that lie side by side in the
arena cross the link together, through a staging buffer on the device: every copy has a fixed cost.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from .. import devices
from ..digests.digest import Digest, Pending, queue_digests, read_together
from ..digests.gathering import IN_PLACE, LEAST_STAGING
from ..errors import is_out_of_memory
from ..interrupts import cleaning_up
from ..memory import arena, blocks, giving_back, pages, pinning
from ..memory.blocks import Block, HostBlock, place_of
from ..memory.file_reading import ReadAhead
from ..memory.mapped_files import MappedFile
from ..memory.ring import Ring
from ..storages import EMPTY, as_bytes, empty

# Called as (bytes copied, bytes in all). What it raises stops the move, which is then rolled back.
Progress = Callable[[int, int], None]

STAGING = 32 << 20  # bytes of VRAM for a batch of small storages; less where there is less
SMALL = 16 << 20  # bytes below which a storage travels in a batch
IN_FLIGHT = 4  # copies queued at a time: the link never idles, and an interrupt is never far away


class CopyJob:
    """One storage to be copied to `device`.

    Attributes:
        source: where its bytes are.
        target: where they go; None: allocated on the device just before the copy.
        nbytes: size of both.
        place: the host memory that its host side lies in, and the offset there in bytes.
        arrival: an event after which the bytes are there.
        read_digest: gives the digest of what arrived; None where none was taken.
        digest: of the bytes on their accelerator, once it is known.
    """

    __slots__ = (
        "arrival",
        "device",
        "digest",
        "nbytes",
        "place",
        "read_digest",
        "source",
        "target",
    )

    def __init__(
        self,
        source: torch.UntypedStorage,
        device: torch.device,
        target: torch.UntypedStorage | None = None,
    ) -> None:
        self.source, self.device, self.target = source, device, target
        self.nbytes = source.nbytes()
        self.place: tuple[HostBlock, int] | None = None
        self.arrival: Any = None
        self.read_digest: Callable[[], Digest | None] = _no_digest
        self.digest: Digest | None = None

    @property
    def goes_out(self) -> bool:
        """Whether it goes from an accelerator to the host."""
        return self.device.type == "cpu" and self.source.device.type != "cpu"

    def find_place(self) -> None:
        """Notes where its host side lies."""
        on_host = self.source if self.source.device.type == "cpu" else self.target
        self.place = None if on_host is None else place_of(on_host)

    def drop_storages(self) -> None:
        """Drops both storages, so that nobody who keeps this object keeps the memory."""
        self.source, self.target, self.place, self.arrival = EMPTY, None, None, None
        self.read_digest = _no_digest


def _no_digest() -> None:
    return None


class Transfer:
    """Copies under way. Leaving its `with` waits for them: no memory is ever freed below a copy.

    Args:
        total: bytes in all, for progress.
        progress: called each time a copy is done.
        wait: `copy` returns when every byte has arrived; otherwise when all is queued, and only an
            error makes the `with` wait.
        digests: take the digest of what arrives on a device before anybody can change it.
        digests_at_end: of all of it at once, for which it takes LEAST_STAGING bytes of VRAM at
            most; otherwise as it arrives, so that no byte more than the model is held there.
        ring: for what does not lie in page-locked memory; the caller ends it. None: one of its
            own.
        staging: bytes of VRAM for a batch of small storages; None: STAGING.
    """

    def __init__(
        self,
        total: int,
        progress: Progress | None = None,
        *,
        wait: bool = True,
        digests: bool = False,
        digests_at_end: bool = False,
        ring: Ring | None = None,
        staging: int | None = None,
    ) -> None:
        self._copied = 0
        self._total, self._progress, self._wait, self._digests = total, progress, wait, digests
        self._digests_at_end = digests_at_end
        self._without_digest: dict[torch.device, list[CopyJob]] = defaultdict(list)
        self._under_way: deque[tuple[Any, int]] = deque()  # event after a copy, bytes
        self._streams: dict[int, Any] = {}
        self._staging = STAGING if staging is None else staging
        self._pending: list[Pending] = []
        self._unallocated: dict[torch.device, int] = defaultdict(int)  # bytes of targets to come
        self._ring = Ring(total) if ring is None else ring
        self._files = ReadAhead(self._ring, ())
        self._ends_ring = ring is None

    def __enter__(self) -> Transfer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        try:
            if self._wait or kind is not None:
                with cleaning_up(kind is not None):
                    self._wait_for(list(self._streams.values()))
        finally:
            if kind is not None:
                self._pending.clear()  # whoever keeps the traceback keeps no memory
            if self._ends_ring:
                self._ring.end()

    def _wait_for(self, streams: Sequence[Any]) -> None:
        """Waits for every stream, also when one of them raises."""
        if not streams:
            return
        try:
            streams[0].synchronize()
        finally:
            self._wait_for(streams[1:])

    def copy(self, jobs: Sequence[CopyJob]) -> None:
        """Copies every job, in order.

        Raises:
            torch.OutOfMemoryError: a device has no room for a target.
            MappedFileChanged: a source lies in a file that has other bytes now.
        """
        for job in jobs:
            job.find_place()
            if job.target is None:
                self._unallocated[job.device] += job.nbytes
        with (
            torch.no_grad(),
            torch.inference_mode(False),
            ReadAhead(self._ring, [job.place for job in jobs]) as self._files,
        ):
            for batch in self._batches(jobs):
                if batch[0].source.device.type == batch[0].device.type:
                    for job in batch:
                        self._copy_across(job)
                else:
                    self._copy_batch(batch)
                self._let_finish(IN_FLIGHT)
            self._queue_digests_at_end()
            self._let_finish(0)
        self._ring.wait()

    def _batches(self, jobs: Sequence[CopyJob]) -> Iterator[list[CopyJob]]:
        """Splits the jobs into what is copied together.

        The staging buffer of what comes in is never larger than what is still to be allocated on
        that device, so that a restore never holds more there than the model.
        """
        batch: list[CopyJob] = []
        for job in jobs:
            limit = self._staging
            if job.device.type != "cpu":
                limit = min(limit, self._unallocated[job.device] // 2)
            if batch and not _fits_behind(job, batch, limit):
                yield batch
                batch = []
            batch.append(job)
        if batch:
            yield batch

    def _copy_batch(self, batch: Sequence[CopyJob]) -> None:
        """Between the host and a device."""
        out = batch[0].device.type == "cpu"
        device = batch[0].source.device if out else batch[0].device
        if not out:
            for job in batch:
                self._allocate_target(job)
        stream = self._stream(device, "out" if out else "in")
        with devices.on_stream(stream, device):
            event = self._copy_together(stream, batch, device, out)
            if event is not None:
                self._queued(event, batch, bytes_of(batch))
            else:
                self._copy_singly(stream, batch)

    def _copy_together(
        self, stream: Any, batch: Sequence[CopyJob], device: torch.device, out: bool
    ) -> Any:
        """Copies a batch over the link at once; returns the event after it, None where there is no
        room for a buffer.

        The buffer is freed before digests take memory: the allocator keeps it until the copy is
        done.
        """
        staging = self._staging_for(batch, device)
        if staging is None:
            return None
        parts = _parts(staging, batch)
        place = batch[0].place
        assert place is not None
        block, start = place
        on_host = block.as_bytes()[start : start + len(staging)]
        if out:
            torch._foreach_copy_(parts, [as_bytes(job.source) for job in batch])
            return self._cross(stream, place, on_host, staging, out)
        self._cross(stream, place, on_host, staging, out)
        targets = [as_bytes(job.target) for job in batch if job.target is not None]
        torch._foreach_copy_(targets, parts)
        return devices.event_after(stream, device)

    def _copy_singly(self, stream: Any, batch: Sequence[CopyJob]) -> None:
        for job in batch:
            assert job.target is not None
            out = job.device.type == "cpu"
            source, target = as_bytes(job.source), as_bytes(job.target)
            on_host, on_device = (target, source) if out else (source, target)
            for start, end in _pieces(job):
                place = None if job.place is None else (job.place[0], job.place[1] + start)
                event = self._cross(stream, place, on_host[start:end], on_device[start:end], out)
                self._queued(event, [job], end - start, is_last=end == job.nbytes)
                self._let_finish(IN_FLIGHT)

    def _cross(
        self,
        stream: Any,
        place: tuple[HostBlock, int] | None,
        on_host: torch.Tensor,
        on_device: torch.Tensor,
        out: bool,
    ) -> Any:
        """Copies between the host and a device, through the ring where the host's side is not
        page-locked.

        Args:
            place: what the host's side lies in, within one piece of it.

        Returns:
            An event after which the bytes are there.
        """
        block, start = place if place is not None else (None, 0)
        if isinstance(block, MappedFile):
            return self._files.bring(start, on_device, stream)
        if block is not None:
            locked = block.locked(start, start + len(on_host))
        else:  # a tensor of somebody else's
            locked = on_host if pinning.is_possible() and on_host.is_pinned() else None
        if locked is None and self._ring_is_locked(block if out else None):
            if out:
                return self._ring.take(stream, on_device, on_host)

            def copy(at: int, window: torch.Tensor) -> None:
                pages.copy(window, on_host[at : at + len(window)])

            return self._ring.bring(stream, copy, on_device)
        if out:
            on_host.copy_(on_device, non_blocking=True)
        else:
            on_device.copy_(on_host if locked is None else locked, non_blocking=True)
        return devices.event_after(stream, on_device.device)

    def _ring_is_locked(self, written: HostBlock | None) -> bool:
        """Whether bytes can pass through the ring, for which others give up locked memory if they
        must: spares, and the block that is written to."""
        if not pinning.is_possible():
            return False

        def make_room(nbytes: int) -> None:
            nbytes -= arena.trim(max(0, arena.spare_bytes() - nbytes))
            if nbytes > 0 and isinstance(written, Block):
                for end in giving_back.under_way:  # a model that arrives may be copied from it
                    end()
                self._let_finish(0)
                written.unlock(nbytes)

        return self._ring.lock(make_room)

    def _copy_across(self, job: CopyJob) -> None:
        """Between two accelerators, or two places on the host: in order with what both do."""
        source, target = as_bytes(job.source), as_bytes(self._allocate_target(job))
        involved = {job.source.device, job.device}
        for start, end in _pieces(job):
            if job.place is not None and isinstance(job.place[0], MappedFile):
                self._files.bring(job.place[1] + start, target[start:end])
            else:
                target[start:end].copy_(source[start:end])
                devices.synchronize(involved)
            self._done(end - start)

    def _allocate_target(self, job: CopyJob) -> torch.UntypedStorage:
        if job.target is None:
            try:
                job.target = _storage_on(job.device, job.nbytes)
            except RuntimeError as error:
                # Staging of copies under way, or what unread digests hold, may be just what is
                # lacking.
                if not is_out_of_memory(error) or not (self._under_way or self._pending):
                    raise
                self._let_finish(0)
                read_together(self._pending)
                self._pending.clear()
                devices.release_cached([job.device])
                job.target = _storage_on(job.device, job.nbytes)
            self._unallocated[job.device] -= job.nbytes
        return job.target

    def _stream(self, device: torch.device, direction: str) -> Any:
        """The copy stream, behind everything that was queued for these bytes until now.

        What leaves nobody writes to any more: it waits once, and not for what another model
        computes meanwhile. What arrives lies in memory that this thread's stream may just have
        given up.
        """
        stream = devices.own_stream(device, direction)
        if id(stream) not in self._streams:
            self._streams[id(stream)] = stream
            devices.wait_for_work(stream, device)
        elif direction == "in":
            devices.wait_for_own_work(stream, device)
        return stream

    def _staging_for(self, batch: Sequence[CopyJob], device: torch.device) -> torch.Tensor | None:
        """A buffer for a whole batch, gaps included; None for one job, and without room for it."""
        if len(batch) == 1:
            return None
        try:
            return empty(_length(batch), dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._staging //= 4  # this batch is copied singly, the next ones are smaller
            return None

    def _queued(
        self, event: Any, jobs: Sequence[CopyJob], nbytes: int, *, is_last: bool = True
    ) -> None:
        """Notes that a copy was queued, and the event after it; `is_last` when the jobs are
        complete with it."""
        if is_last:
            if self._digests and jobs[0].device.type != "cpu":
                if self._digests_at_end:
                    self._without_digest[jobs[0].device] += jobs
                else:
                    event = self._queue_digests(event, jobs)
            for job in jobs:
                job.arrival = event
        self._under_way.append((event, nbytes))

    def _queue_digests_at_end(self) -> None:
        for jobs in self._without_digest.values():
            event = self._queue_digests(jobs[-1].arrival, jobs)
            for job in jobs:
                job.arrival = event
        self._without_digest.clear()

    def _queue_digests(self, event: Any, jobs: Sequence[CopyJob]) -> Any:
        """On a stream of their own, so that the link does not wait for them.

        They come before the model may use the bytes.
        """
        device = jobs[0].device
        stream = devices.own_stream(device, "digest")
        self._streams[id(stream)] = stream
        stream.wait_event(event)
        with devices.on_stream(stream, device):
            # No byte more than the model is to be held there, or a little for a large one.
            room = self._unallocated[device]
            if self._digests_at_end or all(job.nbytes >= IN_PLACE for job in jobs):
                room = max(room, LEAST_STAGING)
            targets = [job.target for job in jobs if job.target is not None]
            pending = queue_digests(targets, at_most=room)
        self._pending.append(pending)
        for index, job in enumerate(jobs):
            job.read_digest = functools.partial(_read, self._pending, pending, index)
        return devices.event_after(stream, device)

    def _let_finish(self, in_flight: int) -> None:
        """Waits until no more than this many copies are under way."""
        while self._wait and len(self._under_way) > in_flight:
            event, nbytes = self._under_way.popleft()
            event.synchronize()
            self._done(nbytes)

    def _done(self, nbytes: int) -> None:
        self._copied += nbytes
        if self._progress is not None:
            self._progress(self._copied, self._total)


def bytes_of(jobs: Iterable[CopyJob]) -> int:
    """The bytes of all these jobs."""
    return sum(job.nbytes for job in jobs)


def _storage_on(device: torch.device, nbytes: int) -> torch.UntypedStorage:
    return empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()


def _read(unread: list[Pending], pending: Pending, index: int) -> Digest | None:
    """The value of one digest. All that were queued by then are read in one copy."""
    if unread:
        read_together(unread)
        unread.clear()
    return pending.values()[index]


def _fits_behind(job: CopyJob, batch: Sequence[CopyJob], limit: int) -> bool:
    """Whether a job can travel with a batch: the same way, next to it, in one registration."""
    first, last = batch[0], batch[-1]
    if (
        first.place is None
        or job.place is None
        or last.place is None
        or job.place[0] is not last.place[0]
        or job.device != last.device
        or job.source.device != last.source.device
        or max(job.nbytes, last.nbytes) >= SMALL
    ):
        return False
    start, end = first.place[1], job.place[1] + job.nbytes
    gap = job.place[1] - (last.place[1] + last.nbytes)
    in_one_piece = start // blocks.PIECE == (end - 1) // blocks.PIECE
    return 0 <= gap < blocks.ALIGNMENT and end - start <= limit and in_one_piece


def _length(batch: Sequence[CopyJob]) -> int:
    assert batch[0].place is not None and batch[-1].place is not None
    return batch[-1].place[1] + batch[-1].nbytes - batch[0].place[1]


def _parts(staging: torch.Tensor, batch: Sequence[CopyJob]) -> list[torch.Tensor]:
    """What belongs to each job in the staging buffer."""
    assert batch[0].place is not None
    origin = batch[0].place[1]
    starts = [job.place[1] - origin for job in batch if job.place is not None]
    return [staging[start : start + job.nbytes] for start, job in zip(starts, batch, strict=True)]


def _pieces(job: CopyJob) -> Iterator[tuple[int, int]]:
    """The parts of a job that one copy may cover, as (start, end): none crosses the border of two
    registrations of host memory."""
    offset = 0 if job.place is None else job.place[1]
    start = 0
    while start < job.nbytes:
        until_border = blocks.PIECE - (offset + start) % blocks.PIECE
        end = min(job.nbytes, start + until_border)
        yield start, end
        start = end
