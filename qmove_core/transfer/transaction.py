"""One move as one transaction: check, allocate, copy, commit. Whatever fails on the way leaves the model where it was."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from .. import devices, homes, hosting
from ..actions import Action
from ..digests.digest import Digest
from ..errors import CorruptedCopy
from ..interrupts import interrupts_deferred
from ..memory import arena, budget, mapped_files, mirrors
from ..memory.allocation import allocate, bytes_by_device
from ..memory.mirrors import Mirror
from ..model import kinds
from ..model.holders import Straggler, holders_of, tensors_on
from ..model.holdings import Holding, Inventory
from ..settings import settings
from ..storages import rebind
from . import verification
from .copies import Load, Progress, Transfer, bytes_of

log = logging.getLogger("qmove")

_NOTHING = torch.UntypedStorage(0)
DEVICE_ADVICE = "Free memory there first, for example qmove.park() another model."


@dataclass(slots=True)
class Step:
    """One storage of a plan: where it goes, and what is to be known of it there."""

    holding: Holding
    target: torch.device
    origin: homes.Origin | None = None
    strangers: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Relocated:
    """What was done.

    Attributes:
        copied_bytes: without those that a mirror held already.
        stragglers: what did not leave its old device.
        verified: whether digests proved every byte.
    """

    copied_bytes: int
    stragglers: list[Straggler]
    verified: bool


def relocate(
    action: Action,
    inventory: Inventory,
    steps: Sequence[Step],
    *,
    on_commit: Callable[[], None],
    progress: Progress | None = None,
) -> Relocated:
    """Carries out `steps`: all of them, or none.

    Args:
        action: what the caller asked for, for messages.
        inventory: what the model holds; `steps` are about its holdings.
        on_commit: called when everything lies in its new place; if it raises, all goes back.
        progress: called as (bytes done, bytes in all) while copying.
    """
    freight = Freight(action, steps)
    try:
        freight.find_unchanged()
        freight.allocate_on_host()
        freight.copy(progress)
        verified = settings.verify and freight.verify()
        with interrupts_deferred(), torch.inference_mode(False), torch.no_grad():
            stragglers = freight.commit(inventory, on_commit)
    except BaseException as error:
        traceback.clear_frames(
            error.__traceback__
        )  # the loops that were left have storages in their variables
        raise
    finally:
        freight.unload()
    devices.release_cached({step.holding.device for step in steps})
    if steps:
        hosting.tell_moved()
    return Relocated(freight.copied, stragglers, verified)


class Freight:
    """The storages of a plan while they change places: where each comes from and goes to, and what is known of its bytes."""

    def __init__(self, action: Action, steps: Sequence[Step]) -> None:
        self.copied = 0
        self._action, self._steps = action, steps
        self._sources = [step.holding.storage for step in steps]
        self._targets: list[torch.UntypedStorage | None] = [None] * len(steps)
        self._digests: list[Digest | None] = [None] * len(
            steps
        )  # of the bytes on their accelerator
        self._mirrors: list[Mirror | None] = [None] * len(steps)
        self._unchanged = [False] * len(steps)

    def find_unchanged(self) -> None:
        """Looks at which mirrors still hold what lies on the device: those storages need no copy."""
        going_out = [index for index, step in enumerate(self._steps) if _goes_out(step)]
        mirrored = mirrors.take([self._sources[index] for index in going_out])
        for index, mirror in zip(going_out, mirrored, strict=True):
            self._mirrors[index] = mirror
        asked = [
            index for index in going_out if settings.verify or self._mirrors[index] is not None
        ]
        for index, digest in zip(
            asked, mirrors.current_digests([self._sources[i] for i in asked]), strict=True
        ):
            mirror = self._mirrors[index]
            self._digests[index] = digest
            self._unchanged[index] = (
                mirror is not None and digest is not None and digest == mirror.digest
            )
        for index in going_out:
            mirror = self._mirrors[index]
            if mirror is not None and (
                self._unchanged[index] or not mapped_files.slice_of(mirror.host)
            ):
                self._targets[index] = mirror.host  # a mirror that is no longer true is overwritten
            else:
                self._mirrors[index] = (
                    None  # a file is never written to: this needs a place in the arena
                )

    def allocate_on_host(self) -> None:
        """Checks every budget, then allocates what is missing on the host. Devices are allocated on as the copies go."""
        missing = [index for index, target in enumerate(self._targets) if target is None]
        wanted = [
            (self._steps[index].holding.nbytes, self._steps[index].target) for index in missing
        ]
        budget.require(self._action, bytes_by_device(wanted))
        on_host = [index for index in missing if self._steps[index].target.type == "cpu"]
        sizes = [(self._steps[index].holding.nbytes, devices.CPU) for index in on_host]
        for index, storage in zip(
            on_host, allocate(self._action, sizes, DEVICE_ADVICE), strict=True
        ):
            self._targets[index] = storage

    def copy(self, progress: Progress | None) -> None:
        """Copies what has to be copied, and returns when all of it is there."""
        loads = self.loads()
        digests = settings.keep_mirrors or settings.verify
        with (
            let_go_of(loads.values()),
            Transfer(bytes_of(loads.values()), progress, digests=digests) as transfer,
        ):
            self._start(transfer, list(loads.values()))
        self.note_arrivals(loads)
        for index, load in loads.items():
            if load.device.type != "cpu":
                self._digests[index] = load.digest()

    def loads(self) -> dict[int, Load]:
        """What has to be copied, by the number of its step. From now on what those mirrors held is gone."""
        indices = [index for index, unchanged in enumerate(self._unchanged) if not unchanged]
        for index in indices:
            self._mirrors[index] = None
        return {
            index: Load(self._sources[index], self._steps[index].target, self._targets[index])
            for index in indices
        }

    def note_arrivals(self, loads: Mapping[int, Load]) -> None:
        """These have been copied."""
        self.copied = bytes_of(loads.values())
        for index, load in loads.items():
            self._targets[index] = load.target

    def take_digests(self) -> None:
        """Of everything that arrived on a device, for the mirrors."""
        if settings.keep_mirrors:
            self._digests = mirrors.current_digests(
                [target for target in self._targets if target is not None]
            )

    def commit_one(self, index: int) -> StorageWeakRef:
        """Moves one storage for good, and lets go of its old place, which the result watches."""
        step, source, target = self._steps[index], self._sources[index], self._targets[index]
        assert target is not None and step.origin is not None
        with interrupts_deferred():
            rebind(step.holding.tensors + step.strangers, target)
            homes.remember(target, step.origin)
            self._sources[index], self._mirrors[index] = _NOTHING, None
        return StorageWeakRef(source)

    @contextmanager
    def queued(self) -> Iterator[list[Load]]:
        """Queues every copy, and waits for none unless the body fails."""
        loads = list(self.loads().values())
        with (
            let_go_of(loads),
            Transfer(bytes_of(loads), wait=False, digests=settings.keep_mirrors) as transfer,
        ):
            self._start(transfer, loads)
            self._targets = [load.target for load in loads]
            yield loads

    def _start(self, transfer: Transfer, loads: Sequence[Load]) -> None:
        try:
            transfer.copy(loads)
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(loads) from error

    def verify(self) -> bool:
        """Compares digests of what was sent with what arrived.

        Raises:
            CorruptedCopy: they differ, and the model was not changed in between. Nothing was moved.
        """
        try:
            return verification.prove(
                self._action, self._steps, self._sources, self._targets, self._digests
            )
        except CorruptedCopy:
            self._mirrors = [None] * len(
                self._steps
            )  # what is bad may be one of them: next time all is copied
            raise

    def commit(self, inventory: Inventory, on_commit: Callable[[], None]) -> list[Straggler]:
        """Moves the model to where its bytes are now, and lets go of the old ones."""
        self.rebind(inventory, on_commit)
        for step, target, digest in zip(self._steps, self._targets, self._digests, strict=True):
            if step.origin is not None and target is not None:
                step.origin.digest = digest
                homes.remember(target, step.origin)
        _forget_parked(self._sources)
        watched = [StorageWeakRef(source) for source in self._sources]
        cargo, digests = self.hand_over(), self._digests
        cargo.keep_as_mirrors(digests)
        targets, cargo.sources = cargo.targets, []
        return take_strangers_along(self._steps, targets, watched)

    def take_strangers_along(self, watched: Sequence[StorageWeakRef]) -> list[Straggler]:
        """After `commit_one` of every step: what of the old places lives on."""
        return take_strangers_along(
            self._steps, [target for target in self._targets if target is not None], watched
        )

    def rebind(self, inventory: Inventory, on_commit: Callable[[], None]) -> None:
        """Lets every tensor look into its new storage, and puts all of them back if anything goes wrong."""
        try:
            for step, target in zip(self._steps, self._targets, strict=True):
                assert target is not None
                rebind(step.holding.tensors + step.strangers, target)
            kinds.refresh(inventory)
            on_commit()
        except BaseException:
            for step, source in zip(self._steps, self._sources, strict=True):
                rebind(step.holding.tensors + step.strangers, source)
            kinds.refresh(inventory)
            raise

    def hand_over(self) -> Cargo:
        """All storages, to be kept or dropped by the caller. The mirrors are what the model lives in now."""
        cargo = Cargo(self._sources, [target for target in self._targets if target is not None])
        self._sources, self._targets, self._mirrors = [], [], []
        return cargo

    def unload(self) -> None:
        """Lets go of every storage. Whoever keeps a traceback keeps this object: it must not keep the bytes alive as well."""
        mirrors.put_back(self._sources, self._mirrors)  # only if nothing was moved are there any
        for storages in (self._sources, self._targets, self._mirrors):
            storages.clear()

    def _out_of_memory(self, loads: Sequence[Load]) -> Exception:
        load = next(load for load in loads if load.device.type != "cpu" and load.target is None)
        nbytes = bytes_of(other for other in loads if other.device == load.device)
        return budget.out_of_memory(self._action, load.device, nbytes, DEVICE_ADVICE)


@dataclass
class Cargo:
    """The storages of a move that is done: those the bytes came from, and those they are in."""

    sources: list[torch.UntypedStorage]
    targets: list[torch.UntypedStorage]

    def keep_as_mirrors(self, digests: Sequence[Digest | None]) -> None:
        """Keeps what came from the arena to a device, and what nobody else looks into."""
        if not settings.keep_mirrors:
            return
        alone = mirrors.unshared(self.sources)
        kept = [
            index
            for index, target in enumerate(self.targets)
            if target.device.type != "cpu"
            and alone[index]
            and arena.place_of(self.sources[index]) is not None
        ]
        # The last storages of a restore had no room beside them for a digest: it is taken on the host, where that is quick.
        late = [index for index in kept if digests[index] is None]
        found = dict(
            zip(late, mirrors.quick_digests([self.sources[index] for index in late]), strict=True)
        )
        for index in kept:
            digest = digests[index] if digests[index] is not None else found[index]
            if digest is not None:
                mirrors.keep(self.targets[index], self.sources[index], digest)


@contextmanager
def let_go_of(loads: Iterable[Load]) -> Iterator[None]:
    """After an error in the body no load keeps what was allocated for it, whoever keeps the traceback."""
    try:
        yield
    except BaseException:
        for load in loads:
            load.target = None
        raise


def _forget_parked(sources: Iterable[torch.UntypedStorage]) -> None:
    """They hold no parked model any more, whoever still looks into them."""
    for source in sources:
        if source.device.type == "cpu":
            homes.forget(source._cdata)


def _goes_out(step: Step) -> bool:
    return step.target.type == "cpu" and step.holding.device.type != "cpu"


def take_strangers_along(
    steps: Sequence[Step],
    targets: Sequence[torch.UntypedStorage],
    watched: Sequence[StorageWeakRef],
) -> list[Straggler]:
    """Looks at which old storages live on, takes the tensors that hold them along, and reports what cannot be."""
    alive = {
        ref.cdata: (step, target)
        for ref, step, target in zip(watched, steps, targets, strict=True)
        if step.holding.device.type != "cpu" and not ref.expired()
    }
    if not alive:
        return []
    for cdata, tensors in tensors_on(alive.keys()).items():
        _take_along(tensors, *alive[cdata])
        tensors.clear()
    return [
        Straggler(
            step.holding.name, step.holding.device, step.holding.nbytes, holders_of(ref.cdata)
        )
        for ref, step in zip(watched, steps, strict=True)
        if ref.cdata in alive and not ref.expired()
    ]


def _take_along(tensors: list[torch.Tensor], step: Step, target: torch.UntypedStorage) -> None:
    rebind(tensors, target)
    if step.origin is not None:
        step.origin.strangers += [TensorWeakRef(tensor) for tensor in tensors]
    log.debug("took %d tensors outside the model along with %s", len(tensors), step.holding.name)
