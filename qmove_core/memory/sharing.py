"""Finds the bytes that are to be parked among those that are in host memory already, for another
model: the same checkpoint loaded twice. Then both share one copy (`shared.py`).

Digests and sizes only say where to look: whether bytes are the same is decided byte by byte, on the
device, against what nobody can write to any more. So a collision of digests costs time, and never
gives a model another one's bytes.

1. Candidates: parked storages and mirrors of the same size, of which 512 bytes in the middle are
   the same. Where there is none, nothing else is done.
2. The block they lie in becomes one that is written once: its bytes are copied there, storage by
   storage, each tensor that looked into it looks into a private map, and RAM that has become empty
   is given back as it goes. Not for a block that has anything in it whose owner is not known.
3. What is equal, byte for byte, is in host memory already.

What it costs, once: the host copies the bytes (2), and they cross the link to be compared (3), as
they would have crossed it for the park. Later parks find the shared copy as their mirror.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .. import devices, homes
from ..digests.digest import Digest
from ..errors import is_out_of_memory, readable_bytes
from ..interrupts import cleaning_up, interrupts_deferred
from ..settings import settings
from ..storages import as_bytes, rebind, use_count
from . import arena, mirrors, shared
from .blocks import PIECE, Block, place_at, place_of, storages_in
from .budget import has_room_on_host
from .mirrors import Mirror
from .shared import View, WrittenOnce

log = logging.getLogger("qmove")

SAMPLE = 512  # bytes of each storage
WINDOW = 16 << 20  # bytes that are compared at a time


@dataclass(slots=True)
class Shared:
    """A storage over bytes that another model has in host memory, and their digest if known."""

    host: torch.UntypedStorage
    digest: Digest | None


def find_equal(storages: Sequence[torch.UntypedStorage]) -> list[Shared | None]:
    """For each storage on an accelerator a host storage of its own that has the same bytes and
    takes no RAM; None where another model has none, or nobody can tell.

    With the lock of moves held. Tensors of other parked models may look into other host memory
    afterwards, with the same bytes.
    """
    found: list[Shared | None] = [None] * len(storages)
    if settings.share_from is None or not shared.is_possible():
        return found
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, storage in enumerate(storages):
        if storage.nbytes():
            by_device[storage.device].append(index)
    for device, indices in by_device.items():
        try:
            with torch.no_grad(), torch.inference_mode(False):
                for index, equal in _find_on(device, {i: storages[i] for i in indices}):
                    found[index] = equal
        except (MemoryError, OSError, RuntimeError) as error:
            # It only saves RAM, so no park fails for it, but for what a device reports.
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            log.info(
                "models with the same weights do not share host memory this time: %s", str(error)
            )
    return found


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes in a block of the arena, which a parked model or a mirror looks at."""

    block: Block
    start: int
    nbytes: int


def _find_on(
    device: torch.device, storages: dict[int, torch.UntypedStorage]
) -> Iterator[tuple[int, Shared]]:
    candidates = _candidates({storage.nbytes() for storage in storages.values()})
    if not candidates:
        return
    stream = devices.own_stream(device, "digest")
    devices.wait_for_work(stream, device)
    with devices.on_stream(stream, device):
        pairs = _with_equal_samples(storages, candidates)
    if sum(part.nbytes for part in pairs.values()) < (settings.share_from or 1):
        return
    by_block: dict[int, dict[int, _Part]] = defaultdict(dict)
    for index, part in pairs.items():
        by_block[id(part.block)][index] = part
    for parts in by_block.values():
        once = _written_once(parts.values())
        if once is None:
            continue
        with _awaited(stream), devices.on_stream(stream, device):
            same = _compare(once, device, [(part, storages[i]) for i, part in parts.items()])
        equal = [index for index, is_same in zip(parts, same, strict=True) if is_same]
        if not equal:
            continue
        view = View(once)
        digests = mirrors.current_digests([storages[index] for index in equal])
        for index, digest in zip(equal, digests, strict=True):
            start, nbytes = parts[index].start, parts[index].nbytes
            if digest is not None:
                once.digests[start] = digest
            yield index, Shared(view.storage(start, nbytes, homes.forget), digest)
        log.info(
            "%s of these weights are in host memory already, for another model: shared",
            readable_bytes(sum(parts[index].nbytes for index in equal)),
        )


@contextmanager
def _awaited(stream: Any) -> Iterator[None]:
    """Ends when all is done that was queued: no memory is ever freed below a copy."""
    try:
        yield
    except BaseException:
        with cleaning_up(has_failed=True):
            stream.synchronize()
        raise
    stream.synchronize()


def _candidates(sizes: set[int]) -> list[_Part]:
    """What has one of these sizes; first what is shared already."""
    places = [
        place
        for cdata, origin in homes.parked_storages()
        if (place := place_at(cdata)) is not None and not origin.is_result
    ]
    places += [(m.block, m.start, m.start + m.host.nbytes()) for m in mirrors.in_ram()]
    parts = {
        _Part(block.ram, start, end - start): None
        for block, start, end in places
        if end - start in sizes and block.ram is not None
    }
    return sorted(parts, key=lambda part: (part.block.is_reusable, id(part.block), part.start))


def _with_equal_samples(
    storages: dict[int, torch.UntypedStorage], candidates: Iterable[_Part]
) -> dict[int, _Part]:
    """For storages of one device, by their numbers, what may have the same bytes; nothing twice."""
    here = [as_bytes(storage)[_sampled(storage.nbytes())] for storage in storages.values()]
    there = torch.cat(here).cpu().numpy().tobytes()
    held: dict[tuple[int, bytes], list[_Part]] = defaultdict(list)
    for part in candidates:
        memory = part.block.memory()[part.start : part.start + part.nbytes]
        held[part.nbytes, memory[_sampled(part.nbytes)].tobytes()].append(part)
    found, at = {}, 0
    for index, sample in zip(storages, here, strict=True):
        parts = held.get((storages[index].nbytes(), there[at : at + len(sample)]))
        if parts:
            found[index] = parts.pop(0)
        at += len(sample)
    return found


def _sampled(nbytes: int) -> slice:
    start = max(0, nbytes - SAMPLE) // 2
    return slice(start, min(nbytes, start + SAMPLE))


def _compare(
    once: WrittenOnce, device: torch.device, pairs: Sequence[tuple[_Part, torch.UntypedStorage]]
) -> list[bool]:
    """Whether the bytes of each storage on `device` are those of the part, to which nobody can
    write."""
    differs = torch.zeros(len(pairs), dtype=torch.bool, device=device)
    for number, (part, storage) in enumerate(pairs):
        here, at = as_bytes(storage), 0
        while at < part.nbytes:
            start = part.start + at
            end = min(part.start + part.nbytes, start + WINDOW, (start // PIECE + 1) * PIECE)
            once.pin(start, end)
            there = once.as_bytes()[start:end].to(device, non_blocking=True)
            differs[number].logical_or_((here[at : at + len(there)] != there).any())
            at += len(there)
    return [not it for it in differs.tolist()]


# Blocks become such that are written once ---------------------------------------------------------


class _User:
    """Who looks into a part of a block: a parked storage, or a mirror."""

    def __init__(self, cdata: int, start: int, end: int, mirror: Mirror | None) -> None:
        self.cdata, self.start, self.nbytes, self.mirror = cdata, start, end - start, mirror
        self.origin = homes.origin_at(cdata)

    def is_known(self, block: Block) -> bool:
        """Whether everything that looks there is known, and can look elsewhere."""
        if self.mirror is not None:
            return True
        if self.origin is None or not self.origin.is_parked or self.origin.is_result:
            return False
        tensors = self._tensors()
        if not tensors:
            return False
        storage = _storage_of(tensors[0])
        return place_of(storage) == (block, self.start) and use_count(storage) == len(tensors) + 1

    def look_into(self, view: View) -> bool:
        """Lets all of them look into a view that has the same bytes; False, with nothing done, if
        somebody holds the storage itself, who may write there."""
        if self.mirror is not None:
            self.mirror.host = view.storage(self.start, self.nbytes, homes.forget)
            self.mirror.block = view
            return True
        assert self.origin is not None
        tensors = self._tensors()
        watched = StorageWeakRef(_storage_of(tensors[0]))
        new = view.storage(self.start, self.nbytes, homes.forget)
        rebind(tensors, new)
        homes.remember(new, self.origin)
        if watched.expired():
            return True
        old = torch.UntypedStorage._new_with_weak_ptr(watched.cdata)
        rebind(tensors, old)
        homes.remember(old, self.origin)
        homes.forget(new._cdata)
        return False

    def _tensors(self) -> list[torch.Tensor]:
        assert self.origin is not None
        alive = {id(t): t for ref in self.origin.tensors if (t := ref()) is not None}
        return [tensor for tensor in alive.values() if _storage_of(tensor)._cdata == self.cdata]


def _storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.untyped_storage()


def _written_once(parts: Iterable[_Part]) -> WrittenOnce | None:
    """The block that these parts lie in, all of them in one, as one that is written once; None
    where that can't be, or is too much for them."""
    block, wanted = next(iter(parts)).block, sum(part.nbytes for part in parts)
    if isinstance(block, WrittenOnce):
        return block
    by_host = {mirror.host._cdata: mirror for mirror in mirrors.in_ram()}
    users = [
        _User(cdata, start, end, by_host.get(cdata))
        for cdata, (start, end) in storages_in(block).items()
    ]
    users.sort(key=lambda user: user.start)
    in_all, largest = sum(u.nbytes for u in users), max(u.nbytes for u in users)
    if 2 * wanted < in_all or not all(user.is_known(block) for user in users):
        return None
    if not has_room_on_host(min(in_all, largest + PIECE)):
        return None
    return _moved(block, users, bit_by_bit=not has_room_on_host(in_all))


def _moved(block: Block, users: Iterable[_User], *, bit_by_bit: bool) -> WrittenOnce | None:
    """Moves all that is in a block to one that is written once; None where it had to stop on the
    way, with every user looking at its own bytes.

    Args:
        bit_by_bit: what has moved is unlocked and given back at once, as RAM has no room for both.
            Else that happens in the background, in the end.
    """
    kept = block.memory()  # in use to the end
    once, in_use = arena.allocate_once(block.nbytes)
    view = View(once)
    del in_use  # the view keeps it
    before, after = block.as_bytes(), once.as_bytes()
    discarded = 0
    for user in users:
        here = slice(user.start, user.start + user.nbytes)
        after[here].copy_(before[here])
        with interrupts_deferred():
            if not user.look_into(view):
                return None
        if bit_by_bit and here.stop - discarded > PIECE:
            block.discard_empty_pieces()
            discarded = here.stop
    if bit_by_bit:
        block.discard_empty_pieces()
    del kept, before
    arena.give_back(block)
    return once
