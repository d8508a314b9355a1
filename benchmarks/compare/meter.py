"""What a swap moved, held and took: exact on the simulated GPU, and as near as PyTorch tells on a
real one."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .targets import SWAP_LINKS

SIMULATED = "simcuda" in sys.modules and sys.modules["simcuda"].is_active()
LINKS: tuple[str | None, ...] = SWAP_LINKS if SIMULATED else (None,)


@dataclass
class Reading:
    """One stretch of work: copies and bytes over the link each way, wall seconds, and seconds of
    the link model.

    `link` is None on a real GPU, where the wall is the link's.
    """

    h2d_bytes: int = 0
    h2d_copies: int = 0
    d2h_bytes: int = 0
    d2h_copies: int = 0
    wall: float = 0.0
    link: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def use_link(name: str | None) -> None:
    """Chooses the simulated link."""
    if name is not None:
        from simcuda import link

        link.use(name)


@contextmanager
def measured() -> Iterator[Reading]:
    """Fills the reading at the end of the body, when the device has done all that was asked of it."""
    torch.cuda.synchronize()
    reading = Reading()
    counter = _SimulatedCounter() if SIMULATED else DispatchCounter()
    started = time.perf_counter()
    with counter:
        yield reading
        torch.cuda.synchronize()
    reading.wall = time.perf_counter() - started
    counter.write(reading)


class _SimulatedCounter:
    """The simulator's own counters and clock."""

    def __enter__(self) -> None:
        import simcuda

        self._before, self._clock = simcuda.counters(), simcuda.clock.now()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import simcuda

        self._after, self._seconds = simcuda.counters(), simcuda.clock.now() - self._clock

    def write(self, reading: Reading) -> None:
        for name in ("h2d_bytes", "h2d_copies", "d2h_bytes", "d2h_copies"):
            setattr(reading, name, getattr(self._after, name) - getattr(self._before, name))
        reading.link = self._seconds


class DispatchCounter(TorchDispatchMode):
    """Counts copies between host and device as PyTorch dispatches them, in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = Reading()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "copy_":
            self._count(args[1], args[0])
        elif name == "_to_copy":
            self._count(args[0], result)
        return result

    def _count(self, source: torch.Tensor, target: torch.Tensor) -> None:
        if source.is_cuda and target.device.type == "cpu":
            self.reading.d2h_bytes += source.nbytes
            self.reading.d2h_copies += 1
        elif target.is_cuda and source.device.type == "cpu":
            self.reading.h2d_bytes += source.nbytes
            self.reading.h2d_copies += 1

    def write(self, reading: Reading) -> None:
        for name in ("h2d_bytes", "h2d_copies", "d2h_bytes", "d2h_copies"):
            setattr(reading, name, getattr(self.reading, name))


def vram() -> int:
    """Bytes of live tensors on the device."""
    gc.collect()
    return torch.cuda.memory_allocated()


class PeakRam:
    """The most memory the process had of its own, sampled every 2 ms; the simulated GPU's memory
    does not count.

    Mapped files do not count either: they are page cache, which the system takes back when it needs
    it. Page-locked memory does.
    """

    def __init__(self) -> None:
        self.before = self.most = own_ram()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.most = max(self.most, own_ram())

    def stop(self) -> int:
        """Bytes beyond what there was at the start."""
        self._stop.set()
        self._thread.join()
        return max(self.most, own_ram()) - self.before


def own_ram() -> int:
    """Bytes of RAM that belong to this process alone, without files and without the simulated GPU's
    memory."""
    simulated = torch.cuda.memory_allocated() if SIMULATED else 0
    return _resident() - simulated


def _resident() -> int:
    if sys.platform != "linux":
        return int(psutil.Process().memory_info().rss)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
