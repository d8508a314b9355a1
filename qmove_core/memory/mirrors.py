"""Host copies that outlive a restore, so that parking unchanged weights again copies nothing.

A mirror belongs to a storage on a device, and dies with it. Whether it still holds the same bytes
only its digest can tell: a write through `.data` leaves no trace in PyTorch. It is a cache:
dropping one loses nothing but time.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import WeakIdKeyDictionary

from .. import devices, homes
from ..digests.digest import Digest, digest_storages, queue_digests
from ..digests.gathering import STAGING
from ..errors import readable_bytes
from ..interrupts import interrupts_deferred
from ..storages import EMPTY
from . import arena
from .blocks import HostBlock, place_of, shared_parts
from .shared import WrittenOnce

log = logging.getLogger("qmove")

QUICK_BYTES = 32 << 20  # of which digests on the host take no longer than one more copy
_clock = itertools.count()


@dataclass(slots=True)
class Mirror:
    """A storage of the arena, or over a mapped file, that held the bytes with this digest when it
    was last looked at."""

    host: torch.UntypedStorage
    block: HostBlock
    start: int
    digest: Digest
    used: int = field(default_factory=lambda: next(_clock))


_mirrors: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage on a device -> Mirror


def keep(storage: torch.UntypedStorage, host: torch.UntypedStorage, digest: Digest) -> None:
    """Makes `host`, which nobody else may be able to write to, the mirror of a storage that has
    these very bytes."""
    homes.forget(host._cdata)  # it is no parked storage any more
    place = place_of(host)
    if place is not None and place[0].can_mirror(place[1], digest):
        _mirrors[storage] = Mirror(host, *place, digest)


def of(storage: torch.UntypedStorage) -> Mirror | None:
    """The mirror of a storage on a device; whether it is still true is another question."""
    return _mirrors.get(storage)  # type: ignore[no-any-return]


def take(storages: Sequence[torch.UntypedStorage]) -> list[Mirror | None]:
    """Takes the mirrors of these storages out, so that nothing gives them back while they are in
    use.

    Not those of storages that have another size now, or over files that were written to meanwhile.
    """
    taken: list[Mirror | None] = [_mirrors.pop(storage, None) for storage in storages]
    starts: dict[HostBlock, list[int]] = defaultdict(list)
    for index, mirror in enumerate(taken):
        if mirror is not None and mirror.host.nbytes() == storages[index].nbytes():
            starts[mirror.block].append(mirror.start)
        else:
            taken[index] = None  # its owner has resized the storage since
    valid = {block for block in starts if block.are_still_valid(starts[block])}
    return [mirror if mirror is not None and mirror.block in valid else None for mirror in taken]


def put_back(storages: Sequence[torch.UntypedStorage], mirrors: Sequence[Mirror | None]) -> None:
    """Undoes `take`."""
    for storage, mirror in zip(storages, mirrors, strict=True):
        if mirror is not None:
            _mirrors[storage] = mirror


def current_digests(
    storages: Sequence[torch.UntypedStorage], *, at_most: int | None = None
) -> list[Digest | None]:
    """The digests of storages on accelerators, behind all work queued on them; None where they
    could not be computed.

    Args:
        at_most: bytes of staging that may be taken there; None: what makes it fast.
    """
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, storage in enumerate(storages):
        by_device[storage.device].append(index)
    digests: list[Digest | None] = [None] * len(storages)
    for device, indices in by_device.items():
        stream = devices.own_stream(device, "digest")
        devices.wait_for_work(stream, device)
        with devices.on_stream(stream, device):
            chosen = [storages[index] for index in indices]
            found = queue_digests(chosen, at_most=at_most or STAGING).values()
        for index, digest in zip(indices, found, strict=True):
            digests[index] = digest
    return digests


def known_digest(storage: torch.UntypedStorage) -> Digest | None:
    """The digest that is known already of a parked storage, or of one that has a mirror: of its
    bytes when they were last looked at. None where there is none."""
    if storage.device.type != "cpu":
        mirror = of(storage)
        return None if mirror is None else mirror.digest
    origin = homes.origin_of(storage)
    if origin is None or not origin.is_parked:
        return None
    if origin.digest is not None:
        return origin.digest
    block, start = place_of(storage) or (None, 0)
    ram = None if block is None else block.ram
    return ram.digests.get(start) if isinstance(ram, WrittenOnce) else None


def quick_digests(storages: Sequence[torch.UntypedStorage]) -> list[Digest | None]:
    """The digests of host storages; None for all of them if they are
    more than QUICK_BYTES."""
    if sum(storage.nbytes() for storage in storages) > QUICK_BYTES:
        return [None] * len(storages)
    return list(digest_storages(storages))


def nbytes() -> int:
    """Bytes of the arena in which mirrors lie, and no parked model. Those over files take none."""
    parked = {(ram, start) for ram, start, _end in _parked_parts()}
    sizes = {
        (id(mirror.block.ram), mirror.start): mirror.host.nbytes()
        for mirror in list(_mirrors.values())
        if mirror.block.ram is not None
    }
    return arena.bytes_for([size for part, size in sizes.items() if part not in parked])


def in_ram() -> list[Mirror]:
    """The mirrors in the arena."""
    return [mirror for mirror in list(_mirrors.values()) if mirror.block.ram is not None]


def shared_bytes() -> int:
    """Bytes that parked models would take beyond what they do if they shared nothing."""
    parts = _parked_parts()
    return sum(end - start for _ram, start, end in parts) - sum(
        end - start for _ram, start, end in set(parts)
    )


def _parked_parts() -> list[tuple[int, int, int]]:
    """Of each parked storage in a view of what models share the `id` of the block, and where its
    bytes begin and end there."""
    parts = shared_parts()
    for mirror in list(_mirrors.values()) if parts else ():
        parts.pop(mirror.host._cdata, None)
    return list(parts.values())


@interrupts_deferred()  # one that ends a finalizer would keep what that gives back
def release(wanted: int) -> int:
    """Drops mirrors until the arena can give at least `wanted` bytes back, the least recently used
    first.

    Returns:
        The bytes of the mirrors that were dropped; `arena.trim` gives them to the system.
    """
    groups: dict[int, list[tuple[torch.UntypedStorage, Mirror]]] = defaultdict(list)
    for storage, mirror in list(_mirrors.items()):
        if mirror.block.ram is not None:  # a block is given back only as a whole
            groups[id(mirror.block.ram)].append((storage, mirror))
    for ram, _start, _end in _parked_parts():
        groups.pop(ram, None)
    released = 0
    for group in sorted(
        groups.values(), key=lambda group: max(mirror.used for _storage, mirror in group)
    ):
        if released >= wanted:
            break
        released += sum({mirror.start: mirror.host.nbytes() for _storage, mirror in group}.values())
        for storage, _mirror in group:
            _mirrors.pop(storage, None)
    if released:
        log.info(
            "gave up host copies of %s: parking those models again will copy them",
            readable_bytes(released),
        )
    return released


def let_go(storages: list[torch.UntypedStorage]) -> list[bool]:
    """For each storage of the list, which no other record of qmove may hold, whether nobody holds
    it: then nobody can write to its bytes later.

    The list lets go of each of them and looks whether it dies. If so, a new storage over the same
    bytes takes its place in the list. Whoever keeps an old one, be it a tensor, a local variable, a
    traceback or a debugger, keeps it from dying. One outside of all blocks never counts as alone.
    """
    alone = []
    for index in range(len(storages)):
        place, nbytes = place_of(storages[index]), storages[index].nbytes()
        if place is None:
            alone.append(False)
            continue
        block, start = place
        in_use = block.memory()
        ref = StorageWeakRef(storages[index])
        storages[index] = EMPTY
        held = None if ref.expired() else torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
        alone.append(held is None)
        storages[index] = block.storage(start, nbytes, homes.forget) if held is None else held
        del held, in_use
    return alone
