"""Host copies that outlive a restore, so that parking unchanged weights again copies nothing.

A mirror belongs to a storage on a device, and dies with it. Whether it still holds the same bytes
only its digest can tell: a write through `.data` leaves no trace in PyTorch. It is a cache:
dropping one loses nothing but time.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .. import devices, homes
from ..digests.digest import Digest, digest_storages
from ..errors import DigestUnavailable, readable_bytes
from . import arena, mapped_files

log = logging.getLogger("qmove")

_A_MOMENT = 16 << 20  # bytes
_clock = itertools.count()


@dataclass(slots=True)
class Mirror:
    """A storage of the arena, or over a mapped file, that held the bytes with this digest when it
    was last looked at."""

    host: torch.UntypedStorage
    digest: Digest
    used: int = field(default_factory=lambda: next(_clock))


_mirrors: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage on a device -> Mirror


def keep(storage: torch.UntypedStorage, host: torch.UntypedStorage, digest: Digest) -> None:
    """Makes `host`, which nobody else may be able to write to, the mirror of a storage that has
    these very bytes."""
    homes.forget(host._cdata)  # it is no parked storage any more
    part = mapped_files.slice_of(host)
    if (
        part is None or part.digest == digest
    ):  # what was changed while it was parked lies no longer in the file
        _mirrors[storage] = Mirror(host, digest)


def of(storage: torch.UntypedStorage) -> Mirror | None:
    """The mirror of a storage on a device; whether it is still true is another question."""
    return _mirrors.get(storage)  # type: ignore[no-any-return]


def take(storages: Sequence[torch.UntypedStorage]) -> list[Mirror | None]:
    """Takes the mirrors of these storages out, so that nothing gives them back while they are in
    use.

    Not those of storages that have another size now, or over files that were written to meanwhile.
    """
    taken: list[Mirror | None] = [_mirrors.pop(storage, None) for storage in storages]
    for index, storage in enumerate(storages):
        mirror = taken[index]
        if mirror is not None and mirror.host.nbytes() != storage.nbytes():
            taken[index] = None  # its owner has resized the storage since
    in_files = [
        index for index, mirror in enumerate(taken) if mirror and mapped_files.slice_of(mirror.host)
    ]
    in_changed = mapped_files.in_changed_files(
        [mirror.host for index in in_files if (mirror := taken[index])]
    )
    for index, changed in zip(in_files, in_changed, strict=True):
        if changed:
            taken[index] = None
    return taken


def put_back(storages: Sequence[torch.UntypedStorage], mirrors: Sequence[Mirror | None]) -> None:
    """Undoes `take`."""
    for storage, mirror in zip(storages, mirrors, strict=True):
        if mirror is not None:
            _mirrors[storage] = mirror


def current_digests(storages: Sequence[torch.UntypedStorage]) -> list[Digest | None]:
    """The digests of storages on accelerators, behind all work queued on them; None where there is
    no memory to compute it."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, storage in enumerate(storages):
        by_device[storage.device].append(index)
    digests: list[Digest | None] = [None] * len(storages)
    for device, indices in by_device.items():
        stream = devices.own_stream(device, "digest")
        devices.wait_for_work(stream, device)
        try:
            with devices.on_stream(stream, device):
                found = digest_storages([storages[index] for index in indices])
        except (torch.OutOfMemoryError, DigestUnavailable) as error:
            log.debug("no digests on %s, so what is parked from there is copied: %s", device, error)
            continue
        for index, digest in zip(indices, found, strict=True):
            digests[index] = digest
    return digests


def quick_digests(storages: Sequence[torch.UntypedStorage]) -> list[Digest | None]:
    """The digests of host storages; None for all of them if that would take more than a moment."""
    if sum(storage.nbytes() for storage in storages) > _A_MOMENT:
        return [None] * len(storages)
    return list(digest_storages(storages))


def nbytes() -> int:
    """Bytes of the arena in which mirrors lie. Those over files take none."""
    hosts = [mirror.host for mirror in list(_mirrors.values())]
    return arena.bytes_for([host.nbytes() for host in hosts if not mapped_files.slice_of(host)])


def release(wanted: int) -> int:
    """Drops mirrors until the arena can give at least `wanted` bytes back, the least recently used
    first.

    Returns:
        The bytes of the mirrors that were dropped; `arena.trim` gives them to the system.
    """
    groups: dict[int, list[tuple[torch.UntypedStorage, Mirror]]] = defaultdict(list)
    for storage, mirror in list(_mirrors.items()):
        if mapped_files.slice_of(mirror.host):
            continue  # there is nothing to be had
        place = arena.place_of(mirror.host)
        groups[id(place[0]) if place else 0].append(
            (storage, mirror)
        )  # a block is given back only as a whole
    released = 0
    for group in sorted(
        groups.values(), key=lambda group: max(mirror.used for _storage, mirror in group)
    ):
        if released >= wanted:
            break
        released += sum(mirror.host.nbytes() for _storage, mirror in group)
        for storage, _mirror in group:
            _mirrors.pop(storage, None)
    if released:
        log.info(
            "gave up host copies of %s: parking those models again will copy them",
            readable_bytes(released),
        )
    return released


def unshared(storages: list[torch.UntypedStorage]) -> list[bool]:
    """For each storage whether nobody but this list holds it: no tensor looks into it, and nobody
    can write to it later."""
    return [_holders(storages, index) == _ALONE for index in range(len(storages))]


def _holders(storages: list[torch.UntypedStorage], index: int) -> tuple[int, int]:
    return torch._C._storage_Use_Count(storages[index]._cdata), sys.getrefcount(storages[index])


_ALONE = _holders([torch.UntypedStorage(1)], 0)
