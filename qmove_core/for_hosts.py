"""For a program that hosts models (ComfyUI): the one door to the core beside its public names.

A host manages models that others load. It asks where the tensors of a model are and what the model
is, it can free VRAM before a move fails, and it is called after every move. Each name is documented
where it is defined.

    for_hosts.on_shortage(free_vram)        # free_vram(device, nbytes) may park other models
    for_hosts.on_move(mark_state_as_stale)  # also when a parked model woke by itself
    with for_hosts.lock:                    # nothing moves meanwhile
        homes = [for_hosts.parked_home(tensor) for tensor in model.parameters()]
"""

from .devices import (
    free_memory,
    has_context,
    memory_without_context,
    release_cached,
    released_once,
    shares_memory_with_host,
    total_memory,
)
from .devices import known as known_devices
from .errors import first_of, is_out_of_memory, readable_bytes
from .homes import lock, nothing_away, parked_home
from .hosting import on_move, on_page_locking, on_ram_shortage, on_shortage, on_yielding
from .integrations.description import Description, describe
from .memory.blocks import ram_bytes
from .memory.budget import has_room_on_host
from .memory.giving_back import trim_under_pressure
from .memory.limits import total_ram
from .memory.mirrors import known_digest
from .memory.pinning import registered_bytes as page_locked_bytes
from .model.heap import Heap
from .model.places import AT_ONCE, Place, places
from .nvml import Memory, other_processes
from .nvml import memory as memory_of_card
from .parking.pins import Pin, any_pinned, pin_of
from .parking.records import parked_bytes
from .pool.footprint import Footprint
from .pool.keeping import Keeping, Kept
from .pool.keeping import Place as KeepingPlace
from .slots import slots_of

__all__ = [
    "AT_ONCE",
    "Description",
    "Footprint",
    "Heap",
    "Keeping",
    "KeepingPlace",
    "Kept",
    "Memory",
    "Pin",
    "Place",
    "any_pinned",
    "describe",
    "first_of",
    "free_memory",
    "has_context",
    "has_room_on_host",
    "is_out_of_memory",
    "known_devices",
    "known_digest",
    "lock",
    "memory_of_card",
    "memory_without_context",
    "nothing_away",
    "on_move",
    "on_page_locking",
    "on_ram_shortage",
    "on_shortage",
    "on_yielding",
    "other_processes",
    "page_locked_bytes",
    "parked_bytes",
    "parked_home",
    "pin_of",
    "places",
    "ram_bytes",
    "readable_bytes",
    "release_cached",
    "released_once",
    "shares_memory_with_host",
    "slots_of",
    "total_memory",
    "total_ram",
    "trim_under_pressure",
]
