"""A small ring of page-locked slots, through which bytes cross the link that do not lie in
page-locked memory.

A driver copies pageable memory through a small buffer of its own while the caller waits. Through
the ring such a copy is asynchronous as from locked memory: while one slot is on the link, threads
fill or empty another one. It takes 128 MiB of locked memory at most, so that it works where little
may be locked (WSL, containers, Windows) or nothing (mapped files), and less for less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .. import devices
from ..interrupts import all_or_nothing
from . import blocks, pages
from .blocks import Block

SLOT = 32 << 20  # bytes of a slot; a quarter, and a quarter of that, where so much is refused
SLOTS = 4
MIB = 1 << 20
WORTH_IT = MIB  # bytes in all from which on the ring is made for what is in RAM

Read = Callable[[int, torch.Tensor], object]  # fills a slot with what begins so many bytes in


class Ring:
    """Slots that are used in turn. They are there from the first use to `end`.

    Args:
        nbytes: how much will pass in all, so that no more is locked than is of use.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._slots: list[Slot] = []
        self._turns: deque[Slot] = deque()  # of those that are not lent
        self._is_refused = nbytes < WORTH_IT
        self.is_locked = False

    @property
    def nbytes(self) -> int:
        """Bytes that all slots take; 0 before the first use."""
        return sum(slot.nbytes for slot in self._slots)

    def lock(self, make_room: Callable[[int], object]) -> bool:
        """Makes it page-locked memory, unless it is; says whether it is.

        Args:
            make_room: called when that is refused: unlocks that many bytes of something else, if it
                can. Then smaller rings are tried.
        """
        if self._is_refused or self._slots:
            return self.is_locked
        for attempt, slot in enumerate((SLOT, SLOT, SLOT // 4, SLOT // 16)):
            if attempt == 1:
                make_room(self._size(SLOT) * SLOTS)
            if self._make(slot, locked=True):
                return True
        self._is_refused = True
        return False

    def open(self, *, locked: bool = True) -> int:
        """Makes it, unless it is there; returns the bytes of a slot, whole MiB.

        Args:
            locked: page-locked where that is possible.
        """
        if not self._slots and not (locked and self._make(SLOT, locked=True)):
            self._make(SLOT // 4 if locked else SLOT, locked=False)
        return self._slots[0].nbytes

    def bring(self, stream: Any, read: Read, target: torch.Tensor) -> Any:
        """Fills slots by `read` and queues their copies to `target`, on a device.

        Call it with `stream` current. Where nothing may be locked, it does so unlocked.

        Returns:
            An event after the last copy.
        """
        self.open()
        event: Any = None
        for start, end in self._parts(len(target)):
            slot = self._turn()
            window = slot.memory[: end - start]
            read(start, window)
            target[start:end].copy_(window, non_blocking=True)
            event = slot.events[target.device] = devices.event_after(stream, target.device)
        return event

    def take(self, stream: Any, source: torch.Tensor, host: torch.Tensor) -> Unloading:
        """Queues copies of `source`, on a device, to slots, which are emptied to `host` when their
        turn comes again. Only for a ring that is locked. Call it with `stream` current.

        Returns:
            What waits until all of it is there, as an event does (`synchronize`).
        """
        used = []
        for start, end in self._parts(len(host)):
            slot = self._turn()
            slot.memory[: end - start].copy_(source[start:end], non_blocking=True)
            slot.events[source.device] = devices.event_after(stream, source.device)
            slot.host = host[start:end]
            used.append((slot, slot.turns))
        return Unloading(used)

    def show(self, stream: Any, source: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
        """Queues a copy of `source`, on a device and no larger than a slot, to one. Call it with
        `stream` current, after `open`.

        Returns:
            The bytes in the slot, good until all other slots were used, and what waits for them.
        """
        slot = self._turn()
        window = slot.memory[: len(source)]
        window.copy_(source, non_blocking=True)
        slot.events[source.device] = devices.event_after(stream, source.device)
        return window, slot.free

    def lend(self) -> Slot:
        """A slot that is free, and has no turn before it was given back. Call it after `open`, and
        not for the last one."""
        slot = self._turn()
        self._turns.remove(slot)
        return slot

    def take_back(self, slot: Slot) -> None:
        """Ends what `lend` began; its turn comes last."""
        self._turns.append(slot)

    def wait(self) -> None:
        """Waits for the copies of all slots, and empties those that are to be."""
        for slot in self._turns:
            slot.free()

    def end(self) -> None:
        """Gives the slots back, with what nobody waited for. No copy may be under way.

        What interrupts it, even twice, leaves the rest to the next call.
        """
        all_or_nothing(self._end)

    def _end(self) -> None:
        self.is_locked = False
        self._turns.clear()
        while self._slots:
            self._slots[-1].release()
            self._slots.pop()

    def _make(self, slot_bytes: int, *, locked: bool) -> bool:
        """Makes the slots; False where they are to be locked, and that is refused."""
        size = self._size(slot_bytes)
        for _ in range(SLOTS):
            self._slots.append(Slot(size))  # `end` finds also one that is being locked
        if locked and not all(slot.lock() for slot in self._slots):
            self.end()
            return False
        self._turns.extend(self._slots)
        self.is_locked = locked
        return True

    def _size(self, slot: int) -> int:
        """Bytes of each slot: no more than all of them together can use."""
        return min(slot, blocks.PIECE, max(1, -(-self._nbytes // (SLOTS * MIB))) * MIB)

    def _parts(self, nbytes: int) -> list[tuple[int, int]]:
        size = self._slots[0].nbytes
        return [(start, min(nbytes, start + size)) for start in range(0, nbytes, size)]

    def _turn(self) -> Slot:
        """The slot whose turn it is, free."""
        slot = self._turns[0]
        slot.free()
        self._turns.rotate(-1)
        slot.turns += 1
        return slot


class Slot:
    """A part of the ring: a block of its own, locked by one registration.

    Attributes:
        nbytes, memory: its size, and its bytes.
        events: by device, after the copy to or from it that was queued last.
        host: where what arrives in it goes.
        turns: how often it was used.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._block = Block(nbytes)
        self._lent: object = self._block.lend()  # keeps it in use
        self.memory = self._block.as_bytes()
        self.events: dict[torch.device, Any] = {}
        self.host: torch.Tensor | None = None
        self.turns = 0

    def lock(self) -> bool:
        """Page-locks it; says whether it is."""
        return self._block.pin(0, self._block.nbytes)

    def release(self) -> None:
        """Gives it back to the system."""
        self.events.clear()
        self.host = self._lent = None
        if hasattr(self, "memory"):  # begun anew, it is gone
            del self.memory
        self._block.release()

    def free(self) -> None:
        """Waits for its copies, and empties it."""
        while self.events:
            device, event = next(iter(self.events.items()))
            event.synchronize()
            del self.events[device]
        if self.host is not None:
            pages.copy(self.host, self.memory[: len(self.host)])
            self.host = None


class Unloading:
    """Bytes on their way from a device through slots to the host."""

    def __init__(self, used: list[tuple[Slot, int]]) -> None:
        self._used = used  # the slots, and how many turns each had had with this one

    def synchronize(self) -> None:
        """Returns when all of them are there. A slot that was used again was emptied before."""
        for slot, turns in self._used:
            if slot.turns == turns:
                slot.free()
        self._used = []
