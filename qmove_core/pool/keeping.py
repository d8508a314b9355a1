"""What stays loaded within a budget of RAM: the engine of every pool, the one in ComfyUI included.

What is least useful goes first: used longest ago, and cheapest to load again per byte of RAM. It
goes to disk where a folder is set (`qmove.configure(disk_folder=...)`) and reading it back is
quicker than its loader; otherwise it is let go of. A model on a device takes no RAM for it: it does
when it is parked, so room is made before that.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, Generic, TypeVar

import torch

from ..errors import readable_bytes
from ..memory.giving_back import trim
from ..parking.stats import stats
from ..settings import settings

log = logging.getLogger("qmove")

QUICKEST = 1e-3  # seconds: what loads quicker costs as much to look for
READ_SPEED = 500e6  # bytes/s of the disk, until a read was measured: an SSD on SATA


class Place(Enum):
    """Where a model that leaves its device is to go."""

    RAM = "RAM"
    DISK = "disk"
    NOWHERE = "nowhere"  # it is let go of: its loader runs when it is asked for again


class Kept(ABC):
    """Something that stays loaded: a model with its loader, the output of a node.

    Attributes:
        key: what it is asked for by.
        seconds: how long its loader took.
        used_in: what the clock of its `Keeping` said when it was used last.
        home: the device that it is used on, where budgets differ between devices.
    """

    key: str
    seconds: float
    used_in: int
    home: torch.device | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """For people."""

    @property
    @abstractmethod
    def stays(self) -> bool:
        """Whether it must not go now: it is pinned, or in use."""

    @property
    def may_be_on_disk(self) -> bool:
        """Whether qmove can write it to disk."""
        return True

    @abstractmethod
    def identities(self) -> set[Any]:
        """What its models are known by: others may keep the same ones."""

    @abstractmethod
    def bytes_in_ram(self) -> dict[Any, int]:
        """Bytes of RAM that each of its models takes, by its identity."""

    @abstractmethod
    def bytes_in_all(self) -> dict[Any, int]:
        """Bytes of each of its models, wherever they are."""

    @abstractmethod
    def bytes_on_disk(self) -> dict[Any, int]:
        """Bytes of each of its models that are parked in files."""

    @abstractmethod
    def to_disk(self) -> bool:
        """Parks it on disk. Returns whether its RAM is free; logs why not."""

    @abstractmethod
    def let_go(self) -> bool:
        """Gives up what keeps it alive. Returns whether it could."""

    def uselessness(self, clock: int) -> float:
        """How little is lost with it: the longer it was not used, and the more bytes come back for
        a second of loading it again."""
        nbytes = sum(self.bytes_in_all().values())
        return (clock - self.used_in) * nbytes / max(self.seconds, QUICKEST)


K = TypeVar("K", bound=Kept)


class Keeping(Generic[K]):
    """Attributes:
    hits: uses whose loader did not run for it.
    misses: loaders that ran, and whose models are kept since.
    seconds_saved: what the loaders of the hits took when they ran.
    spills: how often something went to disk instead of being let go of.
    clock: goes on with each use; what that is the pool says.
    read_speed: bytes/s at which models came home from disk the last time.
    """

    def __init__(self, limits: Callable[[], Mapping[torch.device | None, int]]) -> None:
        """`limits` gives the budget of RAM in bytes: under None of all that is kept, under a device
        of what is used there."""
        self.hits = self.misses = self.spills = self.clock = 0
        self.seconds_saved = 0.0
        self.read_speed = READ_SPEED
        self._limits = limits
        self._lock = threading.RLock()  # nothing is let go of, and nothing moves, inside
        self._kept: dict[str, K] = {}

    def add(self, kept: K) -> None:
        with self._lock:
            self._kept[kept.key] = kept

    def get(self, key: str) -> K | None:
        return self._kept.get(key)

    def all(self) -> list[K]:
        with self._lock:
            return list(self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def note_read(self, nbytes: int, seconds: float) -> None:
        """So many bytes came home from disk in so long."""
        if nbytes and seconds > 0:
            self.read_speed = nbytes / seconds

    # Room in RAM ----------------------------------------------------------------------------------

    def keep_within(
        self,
        coming: int = 0,
        leaving: K | None = None,
        identity: Any = None,
        *,
        mirrored: int = 0,
        may_go: bool = False,
        may_be_on_disk: bool = True,
    ) -> Place:
        """Keeps to the budgets. Host copies that only make the next park quicker count as well;
        they are given back first to last as the core does.

        Args:
            coming: bytes that are about to be parked in RAM.
            leaving: what they belong to, by `identity`.
            mirrored: bytes of that of which there is a host copy already.
            may_go: whether that may be let go of, where it is among the least useful.
            may_be_on_disk: whether that may go to disk.

        Returns:
            Where it is to go. The caller sends it there, or lets go of it.
        """
        place = Place.RAM
        for device, budget in self._limits().items():
            among = [k for k in self.all() if device is None or k.home == device]
            if leaving is not None and leaving not in among:
                continue
            arriving = {identity: coming} if leaving is not None and place is Place.RAM else {}
            over = _ram_of(among) + sum(arriving.values()) - budget
            if over > 0:
                reason = f"{readable_bytes(budget)} of RAM are full"
                found = self._free(
                    over,
                    reason,
                    among,
                    leaving,
                    arriving,
                    may_go=may_go,
                    may_be_on_disk=may_be_on_disk,
                )
                place = place if found is Place.RAM else found
            if device is None:
                self._trim(budget, coming if place is Place.RAM else 0, mirrored)
        return place

    def _trim(self, budget: int, coming: int, mirrored: int) -> None:
        held = stats()
        spare = held.mirror_bytes + held.spare_bytes - mirrored
        over = self.in_ram() + coming + spare - budget
        if over > 0 and spare > 0:
            trim(min(over, spare))

    def give_up(self, nbytes: int) -> None:
        """RAM is short: has `nbytes` of it come free."""
        self._free(nbytes, "RAM is short", self.all())

    def let_go(self, victims: Iterable[K], reason: str) -> list[K]:
        """Lets go of these, and returns those that went."""
        with self._lock:
            going = [kept for kept in victims if self._kept.get(kept.key) is kept]
        gone = []
        for kept in going:
            name = kept.name
            if kept.let_go():
                log.info("%s does not stay loaded: %s", name, reason)
                gone.append(kept)
        return gone

    def remove(self, kept: K) -> None:
        with self._lock:
            if self._kept.get(kept.key) is kept:
                del self._kept[kept.key]

    def _free(
        self,
        over: int,
        reason: str,
        among: Sequence[K],
        leaving: K | None = None,
        arriving: Mapping[Any, int] | None = None,
        *,
        may_go: bool = False,
        may_be_on_disk: bool = True,
    ) -> Place:
        """Has `over` bytes of RAM less taken, as far as that is possible."""
        place, arriving, going = Place.RAM, arriving or {}, []
        for group, freed in self._least_useful(among, leaving, arriving):
            if over <= 0:
                break
            is_own = any(not kept.identities().isdisjoint(arriving) for kept in group)
            if self._belongs_on_disk(group) and (may_be_on_disk or not is_own):
                if is_own:
                    place, over = Place.DISK, over - freed
                    continue
                if all([kept.to_disk() for kept in group]):
                    self.spills += 1
                    over -= freed
                    continue
            if is_own and not may_go:
                continue
            if is_own:
                place = Place.NOWHERE
            going += group
            over -= freed
        self.let_go(going, reason)
        return place

    def _least_useful(
        self, among: Sequence[K], leaving: K | None, arriving: Mapping[Any, int]
    ) -> Iterator[tuple[list[K], int]]:
        """What may go, the least useful first, each with the bytes of RAM that come free: not what
        stays, nor what takes none."""
        seen: set[int] = set()
        for kept in sorted(among, key=lambda k: (-k.uselessness(self.clock), k.used_in)):
            if id(kept) in seen or (kept.stays and kept is not leaving):
                continue
            sizes = kept.bytes_in_ram()
            freed = sum(sizes.values()) + sum(arriving.get(one, 0) for one in kept.identities())
            if not freed:
                continue
            # What has the same models goes with it: else nothing would be freed.
            mine = kept.identities()
            same = [k for k in self.all() if k is kept or not mine.isdisjoint(k.identities())]
            seen.update(map(id, same))
            if not any(other.stays for other in same if other is not leaving):
                yield same, freed

    def _belongs_on_disk(self, group: Sequence[K]) -> bool:
        """Whether reading it back is quicker than its loaders, and there is a folder for it."""
        if settings.disk_folder is None or not all(kept.may_be_on_disk for kept in group):
            return False
        nbytes = sum(sum(kept.bytes_in_all().values()) for kept in group)
        return nbytes / self.read_speed < sum(kept.seconds for kept in group)

    # Figures --------------------------------------------------------------------------------------

    def in_ram(self) -> int:
        """Bytes of RAM that what is kept takes."""
        return _ram_of(self.all())

    def figures(self, limit: int | None = None) -> dict[str, Any]:
        """For people, as plain data; sizes in bytes. What is on disk is told where a folder is set
        for it."""
        everything: dict[Any, int] = {}
        on_disk: dict[Any, int] = {}
        for kept in self.all():
            everything |= kept.bytes_in_all()
            on_disk |= kept.bytes_on_disk()
        figures = {
            "limit": self._limits().get(None, 0) if limit is None else limit,
            "models": len(everything),
            "nbytes": sum(everything.values()),
            "in_ram": self.in_ram(),
            "hits": self.hits,
            "misses": self.misses,
            "seconds_saved": round(self.seconds_saved, 1),
        }
        if settings.disk_folder is not None or any(on_disk.values()):
            figures |= {"on_disk": sum(on_disk.values()), "spills": self.spills}
        return figures


def _ram_of(among: Iterable[Kept]) -> int:
    sizes: dict[Any, int] = {}
    for kept in among:
        sizes |= kept.bytes_in_ram()
    return sum(sizes.values())
