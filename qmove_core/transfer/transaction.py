"""One move as one transaction: check, allocate, copy, commit. A failure leaves every model where it
was.

Park and move are one plan, a swap is two (`exchange.py`), and a streaming restore commits before it
waits (`parking/streaming.py`). All of them are a list of records (`moves.py`), one commit and one
rollback.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from .. import devices, hosting
from ..collector import collection_deferred
from ..digests.gathering import LEAST_STAGING
from ..errors import (
    CapturingGraph,
    CorruptedCopy,
    DeviceLost,
    NotEnoughMemory,
    is_out_of_memory,
)
from ..interrupts import Later, all_or_nothing, interrupts_deferred, not_a_failure
from ..memory import budget, mirrors, sharing
from ..memory.blocks import place_of
from ..memory.budget import allocate, bytes_by_device
from ..memory.ring import Ring
from ..model import kinds
from ..model.holders import Straggler, holders_of, tensors_on
from ..settings import settings
from ..storages import EMPTY, rebind, rebind_all
from ..tracebacks import clear_own_frames
from .copies import STAGING, CopyJob, Progress, Transfer, bytes_of
from .moves import Done, MovePlan, StorageMove
from .verification import prove

log = logging.getLogger("qmove")

DEVICE_ADVICE = "Free memory there first, for example qmove.park() another model."


def carry_out(plan: MovePlan, progress: Progress | None = None, *, tight: bool = False) -> Done:
    """Moves every storage of a plan, or none.

    Args:
        progress: called as (bytes copied, bytes in all); what it raises undoes the move.
        tight: there is hardly any room on the device, and what is freed there is used again at
            once: little staging, and memory stays with the allocator.

    Raises:
        NotEnoughMemory: checked before the first byte moves.
        CorruptedCopy: `verify` is on, and what arrived is not what was sent.

    What fails after the commit is logged. An interrupt that comes then is raised when all is done.
    """
    with MoveTransaction(plan, tight=tight) as transaction:
        with collection_deferred():
            transaction.use_mirrors()
            transaction.share_with_others()
            transaction.allocate_on_host()
        transaction.copy(transaction.to_copy(), progress)
        verified = settings.verify and transaction.verify()
        with interrupts_deferred() as later, collection_deferred():
            stragglers = transaction.commit(later)
        return Done(plan.copied_bytes, stragglers, verified, transaction.reserved_after)


class MoveTransaction:
    """The storages of one or two plans while they move.

    Leaving its `with` drops every storage that no model needs, and after an error puts back what
    the transaction had taken. Whoever keeps the traceback keeps no memory.

    Attributes:
        reserved_after: once committed, bytes that the allocator could not give back of the devices
            involved; None where that is put off (`devices.released_once`).

    Raises:
        CapturingGraph: on entering it. Nothing has happened yet.
        DeviceLost: on leaving it, in place of the driver's error.
    """

    def __init__(self, *plans: MovePlan, tight: bool = False) -> None:
        self._tight = tight
        self.plans = plans
        self.moves = [move for plan in plans for move in plan.moves]
        self._watched: dict[StorageMove, StorageWeakRef] = {}  # of what was dropped
        self._steps_done, self._have_moved = 0, False  # of the commit
        self._ring = Ring(bytes_of(self.moves))
        self._idle: set[torch.device] = set()  # devices whose work was waited for
        self._has_ended = False
        self.reserved_after: int | None = None

    def __enter__(self) -> MoveTransaction:
        if self._accelerators() and devices.is_capturing():
            raise CapturingGraph(self.plans[0].action)
        return self

    def _accelerators(self) -> set[torch.device]:
        involved = {device for move in self.moves for device in (move.came_from, move.device)}
        return involved - {devices.CPU}

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            with interrupts_deferred():
                all_or_nothing(lambda: self._end(error))
        finally:
            if not self._has_ended:  # an interrupt came before they were held back
                self._end(error)
        lost = None if error is None else devices.lost(error, self._accelerators())
        if error is not None and lost is not None:
            raise DeviceLost(self.plans[0].action, str(lost), error) from error

    def _end(self, error: BaseException | None) -> None:
        self._ring.end()
        if error is not None:
            clear_own_frames(error)
        try:
            if error is not None and self._watched:  # those have moved, with all that looks at them
                self._look_outside()
        finally:
            left = [move for move in self.moves if not move.is_committed and move.mirror]
            mirrors.put_back([move.source for move in left], [move.mirror for move in left])
            for move in self.moves:
                move.mirror = None
                move.drop_storages()
        self._has_ended = True

    # Before anything moves ------------------------------------------------------------------------

    def use_mirrors(self) -> None:
        """Finds the host copies that still hold what lies on the device: nothing to copy there."""
        leaving = [move for move in self.moves if move.goes_out]
        for move, mirror in zip(leaving, mirrors.take([m.source for m in leaving]), strict=True):
            move.mirror = mirror
        asked = [move for move in leaving if settings.verify or move.mirror is not None]
        digests = mirrors.current_digests([m.source for m in asked], at_most=self._staging)
        for move, digest in zip(asked, digests, strict=True):
            move.digest = digest
        for move in leaving:
            if move.mirror is None:
                continue
            move.is_unchanged = move.digest is not None and move.digest == move.mirror.digest
            if move.is_unchanged or move.mirror.block.is_ram:
                move.target = move.mirror.host  # one that is no longer true is written over
            else:
                move.mirror = None  # a file is never written to

    @property
    def _staging(self) -> int | None:
        return LEAST_STAGING if self._tight else None

    def share_with_others(self) -> None:
        """Finds what is in host memory already, for another model: nothing to copy there either.

        That may be the model that comes while this one leaves.
        """
        lacking = [move for move in self.moves if move.goes_out and move.target is None]
        if not lacking:
            return
        coming = [move for move in self.moves if move.came_from.type == "cpu"]
        for move in coming:
            move.source = EMPTY  # what somebody holds is not shared
        try:
            found = sharing.find_equal([move.source for move in lacking])
        finally:
            for move in coming:
                move.source = move.holding.storage
        for move, equal in zip(lacking, found, strict=True):
            if equal is not None:
                move.target, move.digest, move.is_unchanged = equal.host, equal.digest, True

    def allocate_on_host(self, *plans: MovePlan) -> None:
        """Checks every budget of these plans, or of all, then allocates what is lacking on the
        host.

        Devices are allocated on as the copies go.
        """
        for plan in plans or self.plans:
            lacking = [move for move in plan.moves if move.target is None]
            budget.require(plan.action, bytes_by_device([(m.nbytes, m.device) for m in lacking]))
            on_host = [move for move in lacking if move.device.type == "cpu"]
            sizes = [(move.nbytes, move.device) for move in on_host]
            storages = allocate(plan.action, sizes, DEVICE_ADVICE)
            for index, move in enumerate(on_host):
                move.target = storages[index]

    def to_copy(self) -> list[StorageMove]:
        """The moves whose bytes are not there yet. What their mirrors held counts no more."""
        moves = [move for move in self.moves if not move.is_unchanged]
        for move in moves:
            move.mirror = None
        return moves

    # The copies -----------------------------------------------------------------------------------

    def copy(
        self,
        moves: Sequence[StorageMove],
        progress: Progress | None = None,
        *,
        digests: bool | None = None,
    ) -> None:
        """Copies, and returns when every byte is there. Digests are taken where they are of use."""
        if digests is None:
            digests = settings.keep_mirrors or settings.verify
        with Transfer(
            bytes_of(moves), progress, digests=digests, ring=self._ring, staging=self._staging
        ) as transfer:
            self.start(transfer, moves)
        for move in moves:
            if move.device.type != "cpu":
                move.digest = move.read_digest()

    def start(self, transfer: Transfer, moves: Sequence[StorageMove]) -> None:
        """Copies with a transfer that may not wait.

        Raises:
            NotEnoughMemory: a device had no room after all.
        """
        try:
            transfer.copy(moves)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise self._out_of_memory(moves) from error

    def _out_of_memory(self, moves: Sequence[StorageMove]) -> NotEnoughMemory:
        """The error for a device that had no room after all: for a target, or for what the driver
        takes by itself (a stream, the code of a kernel)."""
        coming = [move for move in moves if move.device.type != "cpu"]
        full = next((m for m in coming if m.target is None), (coming or moves)[0])
        device = full.device if coming else full.came_from
        nbytes = bytes_of(move for move in coming if move.device == device) or STAGING
        action = next(plan.action for plan in self.plans if full in plan.moves)
        return budget.out_of_memory(action, device, nbytes, DEVICE_ADVICE)

    def verify(self) -> bool:
        """Compares digests of what was sent with what arrived.

        Raises:
            CorruptedCopy: they differ, and the model was not changed in between.
        """
        try:
            return all([prove(plan.action, plan.moves) for plan in self.plans])
        except CorruptedCopy:
            for move in self.moves:
                move.mirror = None  # what is bad may be one of them: next time all is copied
            raise

    # The commit, and its rollback -----------------------------------------------------------------

    def commit(self, later: Later) -> list[Straggler]:
        """Moves the models to where their bytes are now, or leaves them where they were.

        Afterwards host copies are kept, the old storages dropped, and those that live on returned.
        What fails of that is logged: the models have moved. Its interrupts come `later`.
        """
        pending = [move for move in self.moves if not move.is_committed]
        self._let_work_end(pending)
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            return all_or_nothing(
                lambda: self._commit(pending, later), lambda: self._roll_back(pending)
            )

    def _let_work_end(self, leaving: Sequence[StorageMove]) -> None:
        """Waits, once for each device, until no stream of any thread uses what is freed there next:
        the allocator knows only the stream that it was allocated on."""
        left = {move.came_from for move in leaving if move.source is not EMPTY} - {devices.CPU}
        devices.synchronize(left - self._idle)
        self._idle |= left

    def _commit(self, pending: Sequence[StorageMove], later: Later) -> list[Straggler]:
        steps: list[Callable[[], object]] = [
            lambda: rebind_all((m.tensors, m.target) for m in pending if m.target is not None),
            *(functools.partial(kinds.refresh, plan.held) for plan in self.plans),
            *(move.note_origin for move in pending),
            *(plan.on_commit for plan in self.plans),
        ]
        for step in steps[self._steps_done :]:
            step()
            self._steps_done += 1
        self._have_moved = True
        return self._finish(later)

    def _roll_back(self, pending: Sequence[StorageMove]) -> None:
        if self._have_moved:
            return
        for move in pending:
            move.go_back()
        for plan in self.plans:
            kinds.refresh(plan.held)

    def commit_early(self, move: StorageMove) -> StorageWeakRef:
        """Moves one storage for good and drops its old place, which the result watches.

        Only for models that are asleep: `commit` does the rest for all of them.
        """
        self._let_work_end([move])
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            assert move.target is not None
            all_or_nothing(lambda: self._commit_one(move), move.go_back)
            return self._watched[move]

    def _commit_one(self, move: StorageMove) -> None:
        if move.source is not EMPTY:
            assert move.target is not None
            rebind(move.tensors, move.target)
            move.note_origin()
            self._drop_source(move)

    # After the commit -----------------------------------------------------------------------------

    def _finish(self, later: Later) -> list[Straggler]:
        stragglers: list[Straggler] = []
        with not_a_failure(later, "keep host copies"):
            keep_as_mirrors(self.moves)
        for move in self.moves:
            self._drop_source(move)
        with not_a_failure(later, "look for what stayed behind"):
            stragglers = all_or_nothing(self._look_outside)
        with not_a_failure(later, "give unused memory back to the driver"):
            involved = set() if self._tight else self._accelerators()
            if devices.release_cached(involved):
                self.reserved_after = devices.unreturned(involved)
        if self.moves:
            with not_a_failure(later, "tell the host program of a move"):
                hosting.tell_moved()
        return stragglers

    def _look_outside(self) -> list[Straggler]:
        stragglers = _take_outsiders_along(list(self._watched.items()))
        for plan in self.plans:
            plan.on_outsiders()
        return stragglers

    def _drop_source(self, move: StorageMove) -> None:
        if move.source is not EMPTY:
            self._watched[move] = StorageWeakRef(move.source)
            move.source, move.mirror = EMPTY, None


def keep_as_mirrors(jobs: Sequence[CopyJob], *, always: bool = False) -> None:
    """Keeps the arena's storages that were restored from, and that nobody else looks into.

    Args:
        always: whatever the settings say.
    """
    if not (settings.keep_mirrors or always):
        return
    restored = [
        job
        for job in jobs
        if job.device.type != "cpu" and job.target is not None and place_of(job.source) is not None
    ]
    alone = [job for job, is_alone in zip(restored, unshared(restored), strict=True) if is_alone]
    # The last storages of a restore had no room beside them for a digest: it is taken on the host,
    # where that is quick.
    late = [job for job in alone if job.digest is None]
    for job, digest in zip(late, mirrors.quick_digests([j.source for j in late]), strict=True):
        job.digest = digest
    for job in alone:
        if job.digest is not None and job.target is not None:
            mirrors.keep(job.target, job.source, job.digest)


def unshared(jobs: Sequence[CopyJob]) -> list[bool]:
    """For each job whether nobody else holds its source, or could write to it later."""
    with interrupts_deferred():
        sources = [job.source for job in jobs]
        try:
            for job in jobs:
                job.source = EMPTY  # the list alone holds it now, of all that is ours
            return mirrors.let_go(sources)
        finally:
            for job, source in zip(jobs, sources, strict=True):
                job.source = source


def _take_outsiders_along(
    watched: Sequence[tuple[StorageMove, StorageWeakRef]],
) -> list[Straggler]:
    """Moves the tensors outside the model that hold old storages, and reports what still lives."""
    alive = {
        ref.cdata: move
        for move, ref in watched
        if (move.came_from.type != "cpu" or move.device.type == "cpu") and not ref.expired()
    }
    if not alive:
        return []
    for cdata, tensors in tensors_on(alive).items():
        move = alive[cdata]
        assert move.target is not None
        rebind(tensors, move.target)
        if move.origin is not None:
            move.origin.tensors += [TensorWeakRef(tensor) for tensor in tensors]
        log.debug("moved %d tensors outside the model with %s", len(tensors), move.holding.name)
        tensors.clear()
    return [
        Straggler(move.holding.name, move.came_from, move.nbytes, holders_of(ref.cdata))
        for move, ref in watched
        if ref.cdata in alive and not ref.expired()
    ]
