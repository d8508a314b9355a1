"""What a transaction is given: plans, each with one record for every storage that moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from .. import homes
from ..actions import Action
from ..homes import Origin
from ..memory.budget import bytes_by_device
from ..memory.mirrors import Mirror
from ..model.holders import Straggler
from ..model.holdings import Holding, Inventory
from ..storages import rebind
from .copies import CopyJob, bytes_of


class StorageMove(CopyJob):
    """One storage that moves to `device`.

    Attributes:
        holding: the tensors that look into it.
        before: what was known of it on the host.
        origin: what is to be known of it on the host; None for what needs no way back.
        outsiders: tensors outside the model that looked into it and move with it.
        came_from: the device it was on.
        mirror: the host copy that the storage had, while this move uses it.
        is_unchanged: whether `target` holds the bytes already.
        is_committed: whether its tensors look into `target` for good.
    """

    __slots__ = (
        "before",
        "came_from",
        "holding",
        "is_committed",
        "is_unchanged",
        "mirror",
        "origin",
        "outsiders",
    )

    def __init__(
        self,
        holding: Holding,
        device: torch.device,
        origin: Origin | None = None,
        outsiders: Sequence[torch.Tensor] = (),
    ) -> None:
        super().__init__(holding.storage, device)
        self.holding, self.origin, self.outsiders = holding, origin, list(outsiders)
        self.came_from = self.source.device
        self.before = homes.origin_of(self.source)
        self.mirror: Mirror | None = None
        self.is_unchanged = self.is_committed = False

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor object that looks into the storage and moves with it."""
        return [*self.holding.tensors, *self.outsiders]

    def note_origin(self) -> None:
        """Notes where the bytes on the host came from. What has left the host is parked no more."""
        assert self.target is not None
        if self.origin is not None:
            self.origin.digest = self.digest
            homes.remember(self.target, self.origin)
        if self.came_from.type == "cpu":
            homes.forget(self.source._cdata)
        self.is_committed = True

    def go_back(self) -> None:
        """Lets the tensors look into their old place, as if nothing had been noted of the new."""
        rebind(self.tensors, self.source)
        if self.target is not None and self.origin is not None:
            homes.forget(self.target._cdata)
        if self.before is not None:
            homes.remember(self.source, self.before)
        self.is_committed = False


@dataclass(frozen=True)
class MovePlan:
    """A move of one model.

    Attributes:
        action: what the caller asked for, for messages.
        held: what the model holds.
        moves: one for each storage that moves; what the model needs first comes first.
        on_commit: called when everything lies in its new place; if it raises, all goes back.
        on_outsiders: called when the tensors outside the model have come along, after the commit.
    """

    action: Action
    held: Inventory
    moves: list[StorageMove]
    on_commit: Callable[[], None]
    on_outsiders: Callable[[], None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes of all storages that move."""
        return bytes_of(self.moves)

    @property
    def arriving(self) -> dict[torch.device, int]:
        """Bytes that the moves need on each accelerator."""
        return _on_accelerators((move.nbytes, move.device) for move in self.moves)

    @property
    def departing(self) -> dict[torch.device, int]:
        """Bytes that the moves free on each accelerator."""
        return _on_accelerators((move.nbytes, move.came_from) for move in self.moves)

    @property
    def copied_bytes(self) -> int:
        """Bytes of the storages that no mirror held already."""
        return bytes_of(move for move in self.moves if not move.is_unchanged)

    @property
    def targets(self) -> dict[str, torch.device]:
        """Where each storage that moves goes, by its name."""
        return {move.holding.name: move.device for move in self.moves}

    @property
    def origins(self) -> dict[str, torch.device]:
        """Where each storage that moves comes from, by its name; of a parked one its home."""
        return {
            move.holding.name: move.came_from if move.origin is None else move.origin.home
            for move in self.moves
        }


def _on_accelerators(places: Iterable[tuple[int, torch.device]]) -> dict[torch.device, int]:
    return bytes_by_device([(nbytes, device) for nbytes, device in places if device.type != "cpu"])


@dataclass(frozen=True, slots=True)
class Done:
    """What a transaction did for one plan.

    Attributes:
        copied_bytes: without those that a mirror held already.
        stragglers: what did not leave its old device.
        verified: whether digests proved every byte.
        reserved_after: bytes that the allocator still holds unused on the devices that were left;
            None where its cache is emptied later.
    """

    copied_bytes: int
    stragglers: list[Straggler]
    verified: bool
    reserved_after: int | None = None
