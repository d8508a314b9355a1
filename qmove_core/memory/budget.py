"""Memory, asked for before the first byte moves: whether it fits under every limit, and then all of
it or none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from .. import devices, homes, hosting
from ..actions import Action
from ..errors import NotEnoughDeviceMemory, NotEnoughMemory, is_out_of_memory
from ..settings import settings
from ..storages import empty
from . import arena, giving_back, unlocking
from .limits import room

IN_PIECES = "free VRAM, in pieces"  # the limit where an allocation fails that the figures allow


def require(
    action: Action,
    needed: Mapping[torch.device, int],
    host_advice: str = "",
    device_advice: str = "",
) -> None:
    """Raises NotEnoughMemory if the bytes needed on some device do not fit there; on the host
    qmove's own limit counts too."""
    for device, nbytes in needed.items():
        if device.type == "cpu":
            require_host(
                action, 0 if arena.spare_for(nbytes) else nbytes, settings.ram_limit, host_advice
            )
        else:
            require_device(action, nbytes, device, device_advice)


def require_host(action: Action, nbytes: int, ram_limit: int | None, advice: str = "") -> None:
    """Raises NotEnoughMemory if `nbytes` more of host memory would pass a limit.

    What qmove holds there only to be faster next time is given back first, as far as it is needed;
    then the host of this program lets go of models that it only keeps.
    """
    tightest = room(ram_limit, arena.bytes_taken())
    if nbytes > max(0, tightest.free):
        giving_back.make_room(nbytes - tightest.free)
        unlocking.wait()
        tightest = room(ram_limit, arena.bytes_taken())
    free = max(0, tightest.free)
    if nbytes > free:
        advice = (
            advice
            or "Restore or delete another parked model, close other programs, or raise the limit "
            "named."
        )
        raise NotEnoughMemory(action, "cpu", nbytes, free, tightest.name, advice)


def require_device(action: Action, nbytes: int, device: torch.device, advice: str = "") -> None:
    """Raises NotEnoughMemory if `nbytes` do not fit on `device`."""
    free = _obtainable(device)
    if free is not None and nbytes > free:
        advice = (
            advice
            or "Park another model first, or choose another device: qmove.restore(model, "
            "device=...)."
        )
        raise NotEnoughDeviceMemory(action, str(device), nbytes, free, "free VRAM", advice)


def no_room_within(action: Action, device: torch.device, nbytes: int, free: int) -> NotEnoughMemory:
    """The error for what does not fit into a limit of the caller's own on VRAM."""
    advice = "What it uses at once takes more than the limit leaves: raise the limit."
    return NotEnoughDeviceMemory(
        action, str(device), nbytes, max(0, free), "at_most of qmove.resident", advice
    )


def make_room(needed: Mapping[torch.device, int]) -> bool:
    """Asks the host of this program for room on the accelerators that have too little.

    It may park models for it: a plan that was made before must be made again.

    Returns:
        Whether it was asked.
    """
    lacking = {
        device: nbytes
        for device, nbytes in needed.items()
        if device.type != "cpu" and not has_room({device: nbytes})
    }
    for device, nbytes in lacking.items():
        hosting.ask_for_room(device, nbytes)
    return bool(lacking)


def make_more_room(arriving: Mapping[torch.device, int], leaving: Iterable[torch.device]) -> None:
    """After an allocation failed although the figures said that it fits: gives unused memory of
    these devices back to the driver, and asks the host of this program for as much beside what
    seems to be free.

    Args:
        arriving: bytes that are needed, by device.
        leaving: other devices that are involved.
    """
    devices.release_cached({*arriving, *leaving})
    for device, nbytes in arriving.items():
        hosting.ask_for_room(device, nbytes + (devices.free_memory(device) or 0))


def has_room(needed: Mapping[torch.device, int]) -> bool:
    """Whether the bytes needed on each accelerator are free there now."""
    return all(
        (free := _obtainable(device)) is None or nbytes <= free for device, nbytes in needed.items()
    )


def _obtainable(device: torch.device) -> int | None:
    """Bytes that an allocation can get: what is free, and what yields to it."""
    free = devices.free_memory(device)
    return None if free is None else free + hosting.yielding_bytes(device)


def has_room_on_host(nbytes: int) -> bool:
    """Whether `nbytes` more of host memory may be taken under every limit now."""
    return nbytes <= max(0, room(settings.ram_limit, arena.bytes_taken()).free)


def out_of_memory(
    action: Action, device: torch.device, needed: int, advice: str
) -> NotEnoughMemory:
    """The error for an allocation that failed although the figures said that it fits: what is free
    lies in pieces."""
    free = devices.free_memory(device) or 0
    return NotEnoughDeviceMemory(action, str(device), needed, free, IN_PIECES, advice)


def out_of_host_memory(action: Action, needed: int, error: BaseException) -> NotEnoughMemory:
    """The error for host memory that the system did not give although the figures said so."""
    free = max(0, room(settings.ram_limit, arena.bytes_taken()).free)
    advice = "Close other programs, or raise the limit on this process's memory."
    limit = f"what the system gives ({error})"
    return NotEnoughMemory(action, "cpu", needed, free, limit, advice)


def allocate(
    action: Action, wanted: Sequence[tuple[int, torch.device]], device_advice: str
) -> list[torch.UntypedStorage]:
    """A storage for each (bytes, device), in order; those on the host lie in the arena.

    Raises:
        NotEnoughMemory: a device, or the host, had no room after all. Nothing stays allocated.
    """
    sizes = [nbytes for nbytes, device in wanted if device.type == "cpu"]
    try:
        on_host = iter(arena.allocate(sizes, homes.forget))
    except (MemoryError, OSError) as error:  # a limit that nobody tells: on maps, on commit
        raise out_of_host_memory(action, arena.bytes_for(sizes), error) from error
    giving_back.watch.start()
    storages: list[torch.UntypedStorage] = []
    try:
        for nbytes, device in wanted:
            if device.type == "cpu":
                storages.append(next(on_host))
            else:
                storages.append(empty(nbytes, dtype=torch.uint8, device=device).untyped_storage())
    except RuntimeError as error:
        storages.clear()  # whoever keeps the traceback keeps this frame
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(
            action, device, bytes_by_device(wanted)[device], device_advice
        ) from error
    return storages


def prepare(nbytes: int) -> int:
    """`arena.prepare`, if there is room on the host for so much more. Returns the bytes."""
    prepared = arena.prepare(nbytes) if nbytes and has_room_on_host(nbytes) else 0
    if prepared:
        giving_back.watch.start()
    return prepared


def bytes_by_device(wanted: Sequence[tuple[int, torch.device]]) -> dict[torch.device, int]:
    """The sum of the bytes on each device."""
    totals: dict[torch.device, int] = defaultdict(int)
    for nbytes, device in wanted:
        totals[device] += nbytes
    return totals
