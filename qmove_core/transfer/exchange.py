"""Two models change places: one leaves the device while the other comes, both directions at once.

It goes in rounds (`rounds.py`). In each round some storages of both are copied; those that left
give up their place on the device, which the next round fills. So each device holds no more than the
larger model and one round.

Where the host has room for both models as well, the one that comes keeps its host copy until the
commit. Where it has not, what leaves is written to where the coming model's storages were: then
those are committed round by round too. Whether this can go on to its end is tried before the first
byte moves. Both models are asleep meanwhile, so whoever uses one waits for the end.
"""

from __future__ import annotations

import ctypes
import dataclasses
from contextlib import ExitStack

import torch

from .. import devices, homes
from ..errors import NotEnoughMemory
from ..interrupts import interrupts_deferred
from ..memory import arena, budget, mirrors, unlocking
from ..memory.blocks import ALIGNMENT, HostBlock, gaps_in, place_of
from ..memory.limits import room
from ..settings import settings
from ..storages import rebind, use_count
from .copies import Progress, bytes_of
from .moves import Done, MovePlan, StorageMove
from .rounds import ROUND, Item, Place, Rounds, Slide
from .transaction import MoveTransaction


def exchange(
    leaving: MovePlan,
    coming: MovePlan,
    until_done: ExitStack,
    progress: Progress | None = None,
) -> tuple[Done, Done]:
    """Carries out both plans at once.

    Args:
        until_done: interrupts that come when both have moved are delivered when it ends: the caller
            then knows that they have.

    After an error what has moved has moved: `leaving` and `coming` are both asleep then, each with
    every byte, and the caller plans the way back.

    Raises:
        NotEnoughMemory: checked before the first byte moves.
    """
    asleep = dataclasses.replace(leaving, on_commit=lambda: None)
    with MoveTransaction(asleep, coming) as transaction:
        transaction.use_mirrors()
        transaction.share_with_others()
        swap = _Swap(transaction, leaving, coming)
        with interrupts_deferred():
            leaving.on_commit()
        swap.run(progress)
        if settings.keep_mirrors:
            uncommitted = [move for move in coming.moves if not move.is_committed]
            targets = [move.target for move in uncommitted if move.target is not None]
            for move, digest in zip(uncommitted, mirrors.current_digests(targets), strict=True):
                move.digest = digest
        later = until_done.enter_context(interrupts_deferred())
        stragglers = transaction.commit(later)
        reserved = transaction.reserved_after
        return (
            Done(leaving.copied_bytes, stragglers, False, reserved),
            Done(coming.copied_bytes, [], False, reserved),
        )


class _Swap:
    """The rounds of a swap, and the host memory that they write to."""

    def __init__(self, transaction: MoveTransaction, leaving: MovePlan, coming: MovePlan) -> None:
        self._transaction, self._action = transaction, leaving.action
        self._leaving, self._coming = leaving.moves, coming.moves
        present, wanted = leaving.departing, coming.arriving
        more = {device: max(0, wanted[device] - present.get(device, 0)) for device in wanted}
        budget.require(coming.action, more)
        self._room = more  # no more on each device than the larger of the two takes there
        self._blocks: dict[int, HostBlock] = {}  # that may be written to where a gap is
        self._kept_in_use: list[object] = []
        try:
            transaction.allocate_on_host(leaving)
            self._rounds = self._planned([])
        except NotEnoughMemory:
            self._rounds = self._into_gaps(leaving)

    def run(self, progress: Progress | None) -> None:
        """Copies everything that has to be copied."""
        total = bytes_of(self._transaction.to_copy())
        copied = 0

        def so_far(done: int, _in_this_round: int) -> None:
            if progress is not None:
                progress(copied + done, total)

        while not self._rounds.is_done:
            this = self._rounds.next()
            if not this.out and not this.into:
                slides = self._rounds.close_gaps()
                for slide in slides:
                    self._slide(
                        (self._coming if slide.is_coming else self._leaving)[slide.number], slide
                    )
                if not slides:  # what has moved left less behind than it seemed
                    self._rounds.add(self._new_block(self._rounds.lacking))
                continue
            out, into = (
                [self._leaving[n] for n, _ in this.out],
                [self._coming[n] for n in this.into],
            )
            for move, (_, place) in zip(out, this.out, strict=True):
                if place is not None:
                    move.target = self._storage_at(place, move.nbytes)
            to_copy = [move for move in (*out, *into) if not move.is_unchanged]
            self._transaction.copy(to_copy, so_far, digests=False)
            copied += bytes_of(to_copy)
            for move, (number, _) in zip(out, this.out, strict=True):
                if self._transaction.commit_early(move).expired():
                    self._rounds.has_left(number)
            if self._blocks:
                for move, number in zip(into, this.into, strict=True):
                    if self._transaction.commit_early(move).expired():
                        self._rounds.has_come(number)
                    else:
                        self._rounds.stays(number)

    def _planned(self, gaps: list[Place]) -> Rounds:
        """The rounds of the moves as they are now."""
        leaving = [
            Item(
                move.nbytes,
                move.came_from,
                wanted=arena.bytes_for([move.nbytes]) if move.target is None else 0,
                is_copied=not move.is_unchanged,
            )
            for move in self._leaving
        ]
        coming = [
            Item(move.nbytes, move.device, place=_place_of(move) if self._blocks else None)
            for move in self._coming
        ]
        return Rounds(leaving, coming, self._room, gaps)

    # Where RAM has too little room for both models ------------------------------------------------

    def _into_gaps(self, leaving: MovePlan) -> Rounds:
        """Host memory for what leaves: what the coming model leaves behind, and if that is too
        little a block, as small as it must be.

        Raises:
            NotEnoughMemory: the swap could not go on to its end.
        """
        unlocking.wait()  # every byte counts
        self._coming = sorted(self._coming, key=_address)  # so that gaps grow
        # A part of the leaving model may lie on the host as well: on the way back of such a swap.
        on_host = [h.storage for h in leaving.held.holdings if h.device.type == "cpu"]
        for storage in [*on_host, *(move.source for move in self._coming)]:
            block = _block_of(storage)
            if block is not None and id(block) not in self._blocks:
                self._keep(block)
        for device, more in self._room.items():  # what a round may take beyond the larger one
            free = devices.free_memory(device) or 0
            self._room[device] += max(0, min(ROUND, free - more))
        gaps = [
            Place(key, start, end)
            for key, block in self._blocks.items()
            for start, end in gaps_in(block)
        ]
        rounds, sizes = self._planned(gaps), self._sizes_of_a_block(gaps)
        for nbytes in sizes:
            more_host = [Place("more", 0, nbytes)] if nbytes else []
            if budget.has_room_on_host(nbytes) and rounds.can_finish(more_host):
                if nbytes:
                    rounds.add(self._new_block(nbytes))
                return rounds
        budget.require(self._action, {devices.CPU: sizes[2]})
        raise NotEnoughMemory(
            self._action, "cpu", sizes[2], _free_on_host(), "available RAM, in pieces", _HOST_ADVICE
        )

    def _sizes_of_a_block(self, gaps: list[Place]) -> list[int]:
        """Bytes of a block of our own, that which makes the swap fastest first."""
        lacking = [move.nbytes for move in self._leaving if move.target is None]
        reused = [move.nbytes for move in self._coming if _place_of(move)]
        in_all = arena.bytes_for(lacking)
        beyond = max(0, in_all - arena.bytes_for(reused))
        ahead = arena.bytes_for([max(lacking), max(reused, default=0)])
        # Room on the device is as good: then the coming model goes first.
        there = min(self._room.values(), default=0) + sum(
            gap.nbytes for gap in gaps if gap.nbytes >= arena.bytes_for([max(lacking)])
        )
        sizes = [
            max(0, min(in_all, beyond + wanted) - there)
            for wanted in (max(2 * ahead, 2 * ROUND), 2 * ahead, ahead)
        ]
        all_there_is = _free_on_host() // ALIGNMENT * ALIGNMENT
        return [*sizes, min(in_all, all_there_is), 0]

    def _new_block(self, nbytes: int) -> Place:
        """Host memory of its own.

        Raises:
            NotEnoughMemory: the host has too little room.
        """
        budget.require(self._action, {devices.CPU: nbytes})
        (own,) = budget.allocate(self._action, [(nbytes, devices.CPU)], "")
        block = _block_of(own)
        assert block is not None
        self._keep(block)
        return Place(id(block), 0, nbytes)

    def _keep(self, block: HostBlock) -> None:
        self._blocks[id(block)] = block
        self._kept_in_use.append(block.memory())

    def _storage_at(self, place: Place, nbytes: int) -> torch.UntypedStorage:
        return self._blocks[place.block].storage(place.start, nbytes, homes.forget)

    def _slide(self, move: StorageMove, slide: Slide) -> None:
        """Moves a parked storage of a sleeping model within its block; the places may overlap."""
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            before = move.source if slide.is_coming else move.target
            assert before is not None
            after = self._storage_at(slide.to, move.nbytes)
            ctypes.memmove(after.data_ptr(), before.data_ptr(), move.nbytes)
            rebind(move.tensors, after)
            origin = homes.origin_of(before)
            if origin is not None:
                homes.remember(after, origin)
            if slide.is_coming:
                move.source = after
            else:
                move.target = after


_HOST_ADVICE = "Restore or delete another parked model, close other programs, or raise the limit."


def _free_on_host() -> int:
    return max(0, room(settings.ram_limit, arena.bytes_taken()).free)


def _block_of(storage: torch.UntypedStorage) -> HostBlock | None:
    place = place_of(storage)
    return place[0] if place is not None and place[0].is_ram else None


def _place_of(move: StorageMove) -> Place | None:
    """The host memory that a storage gives up when it has come; None if others look into it."""
    place = place_of(move.source)
    if place is None or not place[0].is_ram:
        return None
    if use_count(move.source) != len(move.tensors) + 1:
        return None
    return Place(id(place[0]), place[1], place[1] + arena.bytes_for([move.nbytes]))


def _address(move: StorageMove) -> tuple[int, int]:
    """Sorts by place."""
    place = place_of(move.source)
    return (0, 0) if place is None else (place[0].address, place[1])
