"""What digests cost, for storages of three kinds: time, kernels, memory.

    python -m simcuda benchmarks/digest.py        # or, with a GPU: python benchmarks/digest.py

On the simulated GPU seconds are the CPU's wall seconds, which say nothing about a GPU; beside them
stand the host's virtual seconds of the link model, in which an operator costs its launch alone. On
a real GPU the best of five, from events.
"""

from __future__ import annotations

import time

import torch
from rich.console import Console
from rich.table import Table

import simcuda
from qmove_core.digests.choosing import available
from qmove_core.digests.digest import digest_storages
from qmove_core.digests.gathering import STAGING

KINDS = ((10_000, 100_000), (280, 7_000_000), (3, 700_000_000))
REPEATS = 5


def storages_of(count: int, nbytes: int, device: torch.device) -> list[torch.UntypedStorage]:
    """Storages of random bytes."""
    content = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=device)
    return [content.clone().untyped_storage() for _ in range(count)]


def seconds_of(storages: list[torch.UntypedStorage]) -> float:
    """Wall seconds until the digests are on the host."""
    torch.accelerator.synchronize()
    started = time.perf_counter()
    digest_storages(storages)
    return time.perf_counter() - started


def kernels_of(storages: list[torch.UntypedStorage]) -> int:
    """Kernels and copies on the device; on the simulated one, operators."""
    if simcuda.is_active():
        link = simcuda.link.current()
        try:
            simcuda.link.use(
                simcuda.link.Link(
                    **{name: 1e30 for name in vars(link)} | {"copy_latency": 0.0, "launch": 1.0}
                )
            )
            simcuda.clock.reset()
            digest_storages(storages)
            return round(simcuda.clock.now())
        finally:
            simcuda.link.use(link)
            simcuda.clock.reset()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        digest_storages(storages)
    return sum(
        event.count
        for event in profile.key_averages()
        if event.device_type == torch.profiler.DeviceType.CUDA
    )


def virtual_seconds_of(storages: list[torch.UntypedStorage]) -> float:
    """The host's, in the link model."""
    simcuda.clock.reset()
    digest_storages(storages)
    return simcuda.clock.now()


def main() -> None:
    """Prints one row for each kind of storages, on the device and on the CPU."""
    gpu = torch.device("cuda", torch.cuda.current_device())
    assert available(gpu)
    simulated = simcuda.is_active()
    table = Table(
        title=f"digests on {torch.cuda.get_device_name()}, torch {torch.__version__}, staging {STAGING >> 20} MiB"
    )
    for heading in (
        "storages",
        "bytes each",
        "device",
        "wall s",
        "GB/s",
        "kernels",
        "peak MiB",
        "virtual ms (simulated)",
    ):
        table.add_column(heading, justify="right")
    for count, nbytes in KINDS:
        for device in (gpu, torch.device("cpu")):
            storages = storages_of(count, nbytes, device)
            kernels = peak = virtual = "-"
            if device == gpu:
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                kernels = str(kernels_of(storages))
                peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"
                virtual = f"{virtual_seconds_of(storages) * 1e3:.2f}" if simulated else "-"
            seconds = min(seconds_of(storages) for _ in range(1 if simulated else REPEATS))
            speed = f"{count * nbytes / seconds / 1e9:.2f}"
            table.add_row(
                f"{count:,}",
                f"{nbytes:,}",
                str(device),
                f"{seconds:.3f}",
                speed,
                kernels,
                peak,
                virtual,
            )
            del storages
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
