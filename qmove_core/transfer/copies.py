"""Copies whole storages between devices and the host, as bytes.

Each direction of each device has a stream of its own, so that copies overlap with each other and with what the model computes.
Host memory is page-locked piece by piece just ahead of the copies, which hides one behind the other. Small storages that lie
side by side in the arena cross the link together, through a staging buffer on the device: every copy has a fixed cost.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch

from .. import devices
from ..digests.digest import IN_PLACE, LEAST_STAGING, Digest, Pending, queue_digests, read_together
from ..errors import DigestUnavailable
from ..memory import arena
from ..memory.mapped_files import Lent
from ..storages import as_bytes

Progress = Callable[
    [int, int], None
]  # bytes done, bytes in all; whatever it raises stops the move, which is then rolled back

STAGING = (
    32 << 20
)  # bytes of VRAM that a batch of small storages takes on its way; less where there is less
SMALL = 16 << 20  # bytes below which a storage travels in a batch
IN_FLIGHT = 4  # copies queued at a time: the link never idles, and an interrupt is never far away


def _no_digest() -> None:
    return None


def _value(all_of_them: list[Pending], pending: Pending, index: int) -> Digest:
    if all_of_them:
        read_together(all_of_them)
        all_of_them.clear()
    return pending.values()[index]


@dataclass(slots=True)
class Load:
    """One storage to be copied to `device`.

    Attributes:
        target: where to; None lets the transfer allocate it on the device, just before it is needed.
        arrival: an event after which it is there.
        on_arrival: called once the host knows that it is there.
        digest: the digest of what arrived; gives None if none was asked for, or could be had.
    """

    source: torch.UntypedStorage
    device: torch.device
    target: torch.UntypedStorage | None = None
    arrival: Any = None
    on_arrival: Callable[[], None] | None = None
    digest: Callable[[], Digest | None] = _no_digest
    nbytes: int = field(init=False)
    place: tuple[arena.HostMemory, int] | None = field(
        init=False
    )  # of its host side in the arena, or in a file

    def __post_init__(self) -> None:
        self.nbytes = self.source.nbytes()
        on_host = self.source if self.source.device.type == "cpu" else self.target
        self.place = arena.place_of(on_host) if on_host is not None else None


@dataclass(frozen=True, slots=True)
class _Copy:
    event: Any
    nbytes: int
    complete: Sequence[Load]  # the loads that are there with it


class Transfer:
    """Copies under way. Leaving its `with` waits for them, so that no memory is ever freed below a copy.

    Args:
        total: bytes in all, for progress.
        progress: called as (bytes done, bytes in all) each time a copy is done.
        wait: `copy` returns when every byte has arrived; otherwise when all is queued, and only an error makes the `with` wait.
        digests: take the digest of what arrives on a device, before anybody can change it: `load.digest()`.
        has_room: asked with (device, bytes, bytes still to come with these) before targets are allocated; while it says no,
            copies that are under way are waited for.
    """

    def __init__(
        self,
        total: int,
        progress: Progress | None = None,
        *,
        wait: bool = True,
        digests: bool = False,
        has_room: Callable[[torch.device, int, int], bool] = lambda device, nbytes, to_come: True,
    ) -> None:
        self.copied = 0
        self._total, self._progress, self._wait = total, progress, wait
        self._digests, self._has_room = digests, has_room
        self._under_way: deque[_Copy] = deque()
        self._streams: dict[int, Any] = {}
        self._staging = STAGING
        self._pending: list[Pending] = []
        self._unallocated: dict[torch.device, int] = defaultdict(
            int
        )  # bytes of targets that are still to come
        self._lent = Lent(())

    def __enter__(self) -> Transfer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _at: TracebackType | None,
    ) -> None:
        if self._wait or kind is not None:
            with ExitStack() as all_of_them:  # also when one of them raises
                all_of_them.callback(self._lent.release)
                for stream in self._streams.values():
                    all_of_them.callback(stream.synchronize)

    def copy(self, loads: Sequence[Load]) -> None:
        """Copies every load, in order.

        Raises:
            torch.OutOfMemoryError: a device has no room for a target.
            MappedFileChanged: a source lies in a file that has other bytes now.
        """
        self._lent = Lent(load.source for load in loads)
        self._lent.begin()
        for load in loads:
            if load.target is None:
                self._unallocated[load.device] += load.nbytes
        with torch.no_grad(), torch.inference_mode(False):
            for batch in self._batches(loads):
                first = batch[0]
                if first.source.device.type == first.device.type:
                    self._copy_across(first)
                elif first.device.type == "cpu":
                    self._copy_out(batch)
                else:
                    self._copy_in(batch)
                self._let_finish(IN_FLIGHT)
            self._let_finish(0)
        if self._wait:
            self._lent.require_unchanged()
        self._lent.let_go_of_storages()

    def _copy_out(self, batch: Sequence[Load]) -> None:
        device = batch[0].source.device
        stream = self._stream(device, "out")
        with devices.on_stream(stream, device):
            if self._copy_together(batch, device, out=True):
                self._queued(stream, batch, bytes_of(batch))
            else:
                self._copy_singly(stream, batch)

    def _copy_in(self, batch: Sequence[Load]) -> None:
        device = batch[0].device
        while self._under_way and not self._has_room(
            device, bytes_of(batch), self._unallocated[device]
        ):
            self._let_finish(len(self._under_way) - 1)
        for load in batch:
            self._target_of(load)
        stream = self._stream(
            device, "in"
        )  # asked for now: that memory may have been in use until a moment ago
        with devices.on_stream(stream, device):
            if self._copy_together(batch, device, out=False):
                self._queued(stream, batch, bytes_of(batch))
            else:
                self._copy_singly(stream, batch)

    def _copy_together(self, batch: Sequence[Load], device: torch.device, *, out: bool) -> bool:
        """Copies a batch over the link at once, if it is one and there is room for a buffer; says whether it did."""
        staging = self._staging_for(batch, device)
        if staging is None:
            return False
        parts = _parts(staging, batch)
        if out:
            torch._foreach_copy_(parts, [as_bytes(load.source) for load in batch])
            _host_side(batch).copy_(staging, non_blocking=True)
        else:
            staging.copy_(_host_side(batch), non_blocking=True)
            torch._foreach_copy_([as_bytes(self._target_of(load)) for load in batch], parts)
        return True

    def _copy_singly(self, stream: Any, batch: Sequence[Load]) -> None:
        for load in batch:
            assert load.target is not None
            source, target = as_bytes(load.source), as_bytes(load.target)
            for start, end in _pieces(load):
                if load.place is not None:
                    block, offset = load.place
                    block.pin(offset + start, offset + end)
                target[start:end].copy_(source[start:end], non_blocking=True)
                self._queued(stream, [load], end - start, is_last=end == load.nbytes)
                self._let_finish(IN_FLIGHT)

    def _copy_across(self, load: Load) -> None:
        """Between two accelerators, or two places on the host: in order with what both sides do."""
        source, target = as_bytes(load.source), as_bytes(self._target_of(load))
        involved = {load.source.device, load.device}
        for start, end in _pieces(load):
            target[start:end].copy_(source[start:end])
            devices.synchronize(involved)
            self._done(end - start)

    def _target_of(self, load: Load) -> torch.UntypedStorage:
        if load.target is None:
            try:
                load.target = _allocate(load)
            except torch.OutOfMemoryError:
                if not self._pending:
                    raise
                self._read_digests()  # what they hold may be just what is lacking
                load.target = _allocate(load)
            self._unallocated[load.device] -= load.nbytes
        return load.target

    def _stream(self, device: torch.device, direction: str) -> Any:
        """The copy stream, behind everything that was queued for these bytes until now."""
        stream = devices.own_stream(device, direction)
        self._streams[id(stream)] = stream
        devices.wait_for_work(stream, device)
        return stream

    def _staging_for(self, batch: Sequence[Load], device: torch.device) -> torch.Tensor | None:
        """A buffer for a whole batch, gaps included; None for a single load, and where there is no room for one."""
        if len(batch) == 1:
            return None
        try:
            return torch.empty(_length(batch), dtype=torch.uint8, device=device)
        except (
            torch.OutOfMemoryError
        ):  # the device is full: this batch goes singly, the next ones are smaller
            self._staging //= 4
            return None

    def _queued(
        self, stream: Any, loads: Sequence[Load], nbytes: int, *, is_last: bool = True
    ) -> None:
        """Notes that something was queued; `is_last` when the loads are complete with it."""
        event = stream.record_event()
        if is_last:
            if self._digests and loads[0].device.type != "cpu":
                event = self._queue_digests(event, loads)
            for load in loads:
                load.arrival = self._lent.until(event, load.source)
        self._under_way.append(_Copy(event, nbytes, loads if is_last else ()))

    def _queue_digests(self, event: Any, loads: Sequence[Load]) -> Any:
        """On a stream of their own, so that the link does not wait for them; they come before the model may use the bytes."""
        device = loads[0].device
        stream = devices.own_stream(device, "digest")
        self._streams[id(stream)] = stream
        stream.wait_event(event)
        try:
            with devices.on_stream(stream, device):
                room = self._unallocated[device]  # no byte more than the model is to be held there,
                if all(load.nbytes >= IN_PLACE for load in loads):
                    room = max(room, LEAST_STAGING)  # or a little, where the model is large
                pending = queue_digests(
                    [load.target for load in loads if load.target is not None], at_most=room
                )
        except (torch.OutOfMemoryError, DigestUnavailable):  # no digest: no mirror either
            return event
        self._pending.append(pending)
        for index, load in enumerate(loads):
            load.digest = functools.partial(_value, self._pending, pending, index)
        return stream.record_event()

    def _read_digests(self) -> None:
        read_together(self._pending)
        self._pending.clear()

    def _let_finish(self, in_flight: int) -> None:
        """Waits until no more than this many copies are under way."""
        while self._wait and len(self._under_way) > in_flight:
            copy = self._under_way.popleft()
            copy.event.synchronize()
            self._done(copy.nbytes)
            for load in copy.complete:
                if load.on_arrival is not None:
                    load.on_arrival()

    def _done(self, nbytes: int) -> None:
        self.copied += nbytes
        if self._progress is not None:
            self._progress(self.copied, self._total)

    def _batches(self, loads: Sequence[Load]) -> Iterator[list[Load]]:
        """Splits the loads into what is copied together.

        The staging buffer of what comes in is never larger than what is still to be allocated on that device, so that a
        restore never holds more there than the model.
        """
        batch: list[Load] = []
        for load in loads:
            going_out = load.device.type == "cpu"
            limit = (
                self._staging
                if going_out
                else min(self._staging, self._unallocated[load.device] // 2)
            )
            if batch and not _fits_behind(load, batch, limit):
                yield batch
                batch = []
            batch.append(load)
        if batch:
            yield batch


def _fits_behind(load: Load, batch: Sequence[Load], limit: int) -> bool:
    """Whether a load can travel with a batch: the same way, as its neighbour in the arena, within one registration."""
    first, last = batch[0], batch[-1]
    if load.place is None or last.place is None or load.place[0] is not last.place[0]:
        return False
    if (
        load.device != last.device
        or load.source.device != last.source.device
        or max(load.nbytes, last.nbytes) >= SMALL
    ):
        return False
    assert first.place is not None
    gap = load.place[1] - (last.place[1] + last.nbytes)
    end = load.place[1] + load.nbytes
    in_one_piece = first.place[1] // arena.PIECE == (end - 1) // arena.PIECE
    return 0 <= gap < arena.ALIGNMENT and end - first.place[1] <= limit and in_one_piece


def _length(batch: Sequence[Load]) -> int:
    assert batch[0].place is not None and batch[-1].place is not None
    return batch[-1].place[1] + batch[-1].nbytes - batch[0].place[1]


def _host_side(batch: Sequence[Load]) -> torch.Tensor:
    """The bytes of the arena that a batch covers, page-locked if that is possible."""
    assert batch[0].place is not None
    block, start = batch[0].place
    end = start + _length(batch)
    block.pin(start, end)
    return block.bytes()[start:end]


def _parts(staging: torch.Tensor, batch: Sequence[Load]) -> list[torch.Tensor]:
    """What belongs to each load in the staging buffer."""
    assert batch[0].place is not None
    origin = batch[0].place[1]
    starts = [load.place[1] - origin for load in batch if load.place is not None]
    return [staging[start : start + load.nbytes] for start, load in zip(starts, batch, strict=True)]


def _pieces(load: Load) -> Iterator[tuple[int, int]]:
    """The parts of a load that one copy may cover, as (start, end): none crosses the border of two registrations."""
    start, offset = 0, load.place[1] if load.place is not None else 0
    while start < load.nbytes:
        end = min(load.nbytes, start + arena.PIECE - (offset + start) % arena.PIECE)
        yield start, end
        start = end


def bytes_of(loads: Iterable[Load]) -> int:
    """The bytes of all these loads."""
    return sum(load.nbytes for load in loads)


def _allocate(load: Load) -> torch.UntypedStorage:
    return torch.empty(load.nbytes, dtype=torch.uint8, device=load.device).untyped_storage()
