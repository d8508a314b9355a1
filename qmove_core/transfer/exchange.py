"""Two models change places: one leaves the device while the other comes, both directions at once.

It goes in rounds. In each round some storages of both are copied; those that left give up their
place on the device, which the next round fills. So each device holds no more than the larger model
and one round.

Where the host has room for both models as well, the one that comes keeps its host copy until the
commit. Where it has not, what leaves is written to where the coming model's storages were: then
those are committed round by round too. Both models are asleep meanwhile, so whoever uses one waits
for the end.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Sequence

import torch

from .. import devices, homes
from ..errors import NotEnoughMemory
from ..interrupts import interrupts_deferred
from ..memory import arena, budget, mirrors
from ..settings import settings
from ..storages import use_count
from .copies import Progress, bytes_of
from .moves import Done, MovePlan, StorageMove
from .transaction import MoveTransaction

ROUND = 32 << 20  # bytes of each direction in one round


def exchange(
    leaving: MovePlan, coming: MovePlan, progress: Progress | None = None
) -> tuple[Done, Done]:
    """Carries out both plans at once.

    After an error what has moved has moved: `leaving` and `coming` are both asleep then, each with
    every byte, and the caller plans the way back.

    Raises:
        NotEnoughMemory: checked before the first byte moves.
    """
    asleep = dataclasses.replace(leaving, on_commit=lambda: None)
    with MoveTransaction(asleep, coming) as transaction:
        transaction.use_mirrors()
        rounds = _Rounds(transaction, leaving, coming)
        with interrupts_deferred():
            leaving.on_commit()
        rounds.run(progress)
        if settings.keep_mirrors:
            uncommitted = [move for move in coming.moves if not move.is_committed]
            targets = [move.target for move in uncommitted if move.target is not None]
            for move, digest in zip(uncommitted, mirrors.current_digests(targets), strict=True):
                move.digest = digest
        transaction.commit()
        stragglers = transaction.finish()
        return Done(leaving.copied_bytes, stragglers, False), Done(coming.copied_bytes, [], False)


class _Rounds:
    """Which storages are copied next."""

    def __init__(self, transaction: MoveTransaction, leaving: MovePlan, coming: MovePlan) -> None:
        self._transaction = transaction
        self._leaving, self._coming = deque(leaving.moves), deque(coming.moves)
        self._present = defaultdict(int, leaving.departing)
        wanted = coming.arriving
        self._most = {
            device: max(nbytes, self._present[device]) for device, nbytes in wanted.items()
        }
        more = {device: self._most[device] - self._present[device] for device in wanted}
        budget.require(coming.action, more)
        self._host_room: _HostRoom | None = None
        try:
            transaction.allocate_on_host(leaving)
        except NotEnoughMemory:
            self._host_room = _HostRoom(leaving, coming, min(more.values()))
        if self._host_room is not None:
            self._coming = deque(sorted(coming.moves, key=_place_on_host))

    def run(self, progress: Progress | None) -> None:
        """Copies everything that has to be copied."""
        total = bytes_of(self._transaction.to_copy())
        copied = 0

        def so_far(done: int, _in_this_round: int) -> None:
            if progress is not None:
                progress(copied + done, total)

        while self._leaving or self._coming:
            out, into = self._next()
            to_copy = [move for move in (*out, *into) if not move.is_unchanged]
            self._transaction.copy(to_copy, so_far, digests=False)
            copied += bytes_of(to_copy)
            for move in out:
                if self._transaction.commit_early(move).expired():
                    self._present[move.came_from] -= move.nbytes
            if self._host_room is not None:
                for move in into:
                    self._host_room.free(move, self._transaction)

    def _next(self) -> tuple[list[StorageMove], list[StorageMove]]:
        out: list[StorageMove] = []
        while self._leaving and bytes_of(m for m in out if not m.is_unchanged) < ROUND:
            move = self._leaving[0]
            if move.target is None and not (self._host_room and self._host_room.take(move)):
                break
            out.append(self._leaving.popleft())
        into: list[StorageMove] = []
        while self._coming and (bytes_of(into) < ROUND or not self._leaving):
            move = self._coming[0]
            has_room = self._present[move.device] + move.nbytes <= self._most[move.device]
            # Where nothing is left to leave, the allocation itself decides.
            if not has_room and (out or into or self._leaving):
                break
            self._present[move.device] += move.nbytes
            into.append(self._coming.popleft())
        if not out and not into:
            if self._coming:
                into.append(self._coming.popleft())
            else:  # what came left less behind than it seemed
                assert self._host_room is not None
                self._host_room.add_block([move.nbytes for move in self._leaving])
        return out, into


class _HostRoom:
    """Host memory for what leaves where there is too little for both models.

    One block of its own, as small as it can be, and what the storages of the coming model leave
    behind.
    """

    def __init__(self, leaving: MovePlan, coming: MovePlan, spare_on_device: int) -> None:
        lacking = [move.nbytes for move in leaving.moves if move.target is None]
        reused = [
            move.nbytes
            for move in coming.moves
            if _place_in_arena(move.source) and use_count(move.source) == len(move.tensors) + 1
        ]
        # A part of the leaving model may lie on the host as well: on the way back of such a swap.
        on_host = [h.storage for h in leaving.held.holdings if h.device.type == "cpu"]
        places = map(_place_in_arena, [*on_host, *(move.source for move in coming.moves)])
        blocks = {id(place[0]): place[0] for place in places if place is not None}
        self._action = leaving.action
        self._keep_in_use = [block.bytes() for block in blocks.values()]
        self._free = [
            _Gap(block, *gap) for block in blocks.values() for gap in arena.gaps_in(block)
        ]
        in_all = arena.bytes_for(lacking)
        beyond = max(0, in_all - arena.bytes_for(reused))
        # With the largest storage of each ahead, one of the two directions can go on. With twice as
        # much it always can: a storage does not fit into what is left at the end of a gap.
        ahead = arena.bytes_for([max(lacking), max(reused, default=0)])
        # Room on the device is as good: then the coming model goes first. And so is what an earlier
        # swap left free in these blocks, where it is not in small pieces.
        there = spare_on_device + sum(
            gap.nbytes for gap in self._free if gap.nbytes >= arena.bytes_for([max(lacking)])
        )
        for wanted in (max(2 * ahead, 2 * ROUND), 2 * ahead, ahead):
            nbytes = min(in_all, beyond + wanted) - there
            if budget.has_room_on_host(nbytes):
                break
        if nbytes > 0:
            self.add_block([nbytes])

    def add_block(self, sizes: Sequence[int]) -> None:
        """Allocates a block in which storages of these sizes fit.

        Raises:
            NotEnoughMemory: the host has too little room.
        """
        nbytes = arena.bytes_for(sizes)
        budget.require(self._action, {devices.CPU: nbytes})
        (own,) = arena.allocate([nbytes], homes.forget)
        block, start = _place_in_arena(own) or (None, 0)
        assert block is not None
        self._keep_in_use.append(block.bytes())
        self._free.append(_Gap(block, start, start + nbytes))

    def take(self, move: StorageMove) -> bool:
        """Gives the move a target, if there is a gap that is large enough."""
        nbytes = arena.bytes_for([move.nbytes])
        for gap in self._free:
            if gap.nbytes >= nbytes:
                move.target = arena.storage_at(gap.block, gap.start, move.nbytes, homes.forget)
                gap.start += nbytes
                return True
        return False

    def free(self, move: StorageMove, transaction: MoveTransaction) -> None:
        """Commits a storage that came, and takes over its place on the host, if nobody uses it."""
        place = _place_in_arena(move.source)
        if transaction.commit_early(move).expired() and place is not None:
            block, start = place
            end = start + arena.bytes_for([move.nbytes])
            for gap in self._free:
                if gap.block is block and gap.end == start:
                    gap.end = end
                    return
            self._free.append(_Gap(block, start, end))


@dataclasses.dataclass
class _Gap:
    """Free bytes of a block, from `start` to `end`."""

    block: arena.Block
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def _place_in_arena(storage: torch.UntypedStorage) -> tuple[arena.Block, int] | None:
    place = arena.place_of(storage)
    return (place[0], place[1]) if place is not None and isinstance(place[0], arena.Block) else None


def _place_on_host(move: StorageMove) -> tuple[int, int]:
    """Sorts by place, so that gaps grow."""
    place = arena.place_of(move.source)
    return (0, 0) if place is None else (place[0].address, place[1])
