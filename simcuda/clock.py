"""The virtual clock: what copies, pins and kernels would have taken, exactly and repeatably.

There is one clock for the host, whatever its threads: two threads that wait at once add up, where
on a real machine they would overlap. Streams, copy engines and compute run beside it and beside
each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simcuda import link
from simcuda.library import sim

if TYPE_CHECKING:
    import torch


def now() -> float:
    """The host's virtual time in seconds."""
    return float(sim().sim_now())


def reset() -> None:
    """Back to zero, with every stream and engine idle.

    Events recorded before keep their old times.
    """
    sim().sim_reset_clock()


def advance(seconds: float) -> None:
    """The host is busy with something for this long."""
    if seconds < 0:
        raise ValueError(f"the clock cannot go back ({seconds} s)")
    sim().sim_advance(seconds)


def host_copy(nbytes: int) -> None:
    """The host copies this many bytes from memory to memory."""
    advance(nbytes / link.current().host_copy)


def compute(seconds: float, stream: torch.Stream | None = None) -> None:
    """Queues a kernel that takes this long, on ``stream`` (default: the current device's current
    stream)."""
    if stream is None:
        import torch

        stream = torch.cuda.current_stream()
    sim().sim_compute(stream.device_index, stream.stream_id, seconds)


def stream_ready(stream: torch.Stream) -> float:
    """The virtual time at which all that was queued on the stream so far is done."""
    return float(sim().sim_stream_ready(stream.device_index, stream.stream_id))
