"""Two models take turns by `swap`, and by a park and then a restore: with room for both in RAM, without
mirrors, and with room for only one of them in RAM and one in VRAM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from . import growth, meter

SWAPS = 10
SLACK = 64 << 20  # bytes of VRAM beside the one model: staging and digests
CASES = {
    "RAM for both": (True, False),
    "RAM for both, no mirrors": (False, False),
    "RAM for one, VRAM for one": (True, True),
    "RAM for one, VRAM for one, no mirrors": (False, True),
}
WAYS = ("swap", "park, then restore")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Readings of ten turns, and the most RAM and VRAM they took, of one case and way."""
    import qmove_core as qmove

    torch.cuda.init()
    meter.use_link(meter.LINKS[0])
    mirrors, little = CASES[request["case"]]
    qmove.configure(keep_mirrors=mirrors)
    try:
        waiting = growth.model_of(request["tensors"], request["nbytes"])
        qmove.park(waiting)
        home = growth.model_of(request["tensors"], request["nbytes"])
        held = qmove.inventory(home)
        if not little:
            return _turns(request["way"], home, waiting) | {"ram_limit": None}
        largest = max(holding.nbytes for holding in held.holdings)
        limit = held.nbytes + 4 * largest
        qmove.configure(ram_limit=limit)
        with _only(SLACK):
            return _turns(request["way"], home, waiting) | {"ram_limit": limit}
    finally:
        qmove.configure(keep_mirrors=True, ram_limit=None)


def _turns(way: str, home: Any, waiting: Any) -> dict[str, Any]:
    import qmove_core as qmove

    nbytes = qmove.inventory(home).nbytes
    torch.cuda.reset_peak_memory_stats()
    other = meter.vram() - nbytes
    most_ram = copied = 0
    with meter.measured() as reading:
        for _swap in range(SWAPS):
            if way == "swap":
                gone, _came = qmove.swap(home, waiting)
            else:
                gone = qmove.park(home)
                qmove.restore(waiting)
            copied += gone.copied_bytes
            stats = qmove.stats()
            most_ram = max(most_ram, stats.arena_bytes + stats.mirror_bytes + stats.spare_bytes)
            home, waiting = waiting, home
    return reading.as_dict() | {
        "nbytes": nbytes,
        "out": copied,
        "peak_ram": most_ram,
        "peak_vram": torch.cuda.max_memory_allocated() - other,
    }


@contextmanager
def _only(nbytes: int) -> Iterator[None]:
    """Inside, so much VRAM is free: the rest of it is held."""
    if meter.SIMULATED:
        import simcuda

        capacity = torch.cuda.get_device_properties(0).total_memory
        simcuda.set_memory(torch.cuda.memory_allocated() + nbytes, device=0)
        try:
            yield
        finally:
            simcuda.set_memory(capacity, device=0)
        return
    torch.cuda.empty_cache()
    free, _total = torch.cuda.mem_get_info()
    _held = torch.empty(max(0, free - nbytes), dtype=torch.uint8, device="cuda:0")
    yield
