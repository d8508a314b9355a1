"""How fast a model is parked on disk and comes home from there, against plain writes and reads of the
same bytes, against safetensors, and against the run:ai model streamer (`pip install
runai-model-streamer`; without it that row is missing).

    python benchmarks/disk.py [--gib 2] [--folder FOLDER] [--rounds 3]

All figures are of one run, in turns. "cold" drops the file from the page cache first
(`posix_fadvise`). A plain read is `readinto` of 16 MiB at a time into the same memory; a plain write
is `write` and `fsync`. "attach" without a device reads and proves every byte. Without a GPU the
simulated one is used, whose copies are copies in RAM: the figures then say what the disk and the host
cost, and nothing of a link. Mirrors are off: their digests are the GPU's work, which the host would
have to do for the simulated one.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tests.builders.device  # the simulated GPU comes before torch  # isort: skip

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import qmove_core as qmove
from qmove_core.memory.disk_files import WEIGHTS
from qmove_core.parking import streaming

try:
    from runai_model_streamer import SafetensorsStreamer
except ImportError:
    SafetensorsStreamer = None

PIECE = 16 << 20
SIDE = 4096  # of a weight in float16: 32 MiB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model")
    parser.add_argument("--folder", type=Path, help="on the disk that is to be measured")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qmove-benchmark-", dir=arguments.folder) as temporary:
        measure(Path(temporary), max(1, round(arguments.gib * 32)), arguments.rounds)


def built(count: int) -> nn.Sequential:
    """A stack of `count` weights of 32 MiB on the GPU, all different."""
    model = nn.Sequential(*[nn.Linear(SIDE, SIDE, bias=False, device="meta") for _ in range(count)])
    model = model.half().to_empty(device="cuda").requires_grad_(False)
    for index, layer in enumerate(model):
        layer.weight.view(torch.int16).copy_(
            torch.arange(SIDE * SIDE, dtype=torch.int32).view(SIDE, SIDE) * (2 * index + 1) % 30000
        )
    return model


def measure(folder: Path, count: int, rounds: int) -> None:
    if tests.builders.device.SIMULATED:
        import simcuda

        simcuda.set_memory(f"{count // 8 + 4}GiB", device=0)
    qmove.configure(share_from=None, keep_mirrors=False)
    model = built(count)
    nbytes = count * SIDE * SIDE * 2
    kept, plain, saved = folder / "kept", folder / "plain", folder / "saved.safetensors"
    save_file({name: tensor.cpu() for name, tensor in model.state_dict().items()}, saved)
    room = bytearray(PIECE)
    held: dict[str, object] = {}

    def park() -> None:
        qmove.park(model, to="disk", folder=kept)

    def write() -> None:
        with plain.open("wb", buffering=0) as file:
            for start in range(0, nbytes, PIECE):
                file.write(room[: min(PIECE, nbytes - start)])
            os.fsync(file.fileno())

    def read() -> None:
        with (kept / WEIGHTS).open("rb", buffering=0) as file:
            while file.readinto(room):
                pass

    def attach(device: str | None = None) -> None:
        held["again"] = nn.Sequential(
            *[nn.Linear(SIDE, SIDE, bias=False, device="meta") for _ in range(count)]
        ).half()
        qmove.attach(held["again"], kept, device)

    def restore() -> None:
        qmove.restore(held["again"])

    def stream() -> None:
        qmove.restore(held["again"], stream=True)
        streaming.wait_for()

    def safetensors_to_gpu() -> None:
        held["again"] = load_file(saved, device="cuda:0")

    def streamer_to_gpu() -> None:
        with SafetensorsStreamer() as streamer:
            streamer.stream_file(str(saved))
            held["again"] = {name: t.to("cuda:0") for name, t in streamer.get_tensors()}

    seconds: dict[str, list[float]] = {}

    def timed(
        name: str, act: Callable[[], None], before: Callable[[], None] = lambda: None
    ) -> None:
        held.clear()
        gc.collect()
        before()
        if name.endswith("cold"):
            drop(kept / WEIGHTS)
            drop(saved)
        started = time.perf_counter()
        act()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(rounds):
        for layer in model:
            layer.weight.view(torch.int16).add_(1)  # so that all of it is written anew
        timed("plain write", write)
        timed("park on disk", park)
        for state in ("cold", "warm"):
            timed(f"plain read, {state}", read)
            timed(f"attach, {state}", attach)
            timed(f"restore, {state}", restore, before=attach)
            timed(f"streaming restore, {state}", stream, before=attach)
            timed(f"attach to the GPU, {state}", lambda: attach("cuda:0"))
            timed(f"safetensors to the GPU, {state}", safetensors_to_gpu)
            if SafetensorsStreamer is not None:
                timed(f"run:ai streamer to the GPU, {state}", streamer_to_gpu)
        held.clear()
        qmove.restore(model)
    show(nbytes, seconds)


def drop(path: Path) -> None:
    """Drops a file from the page cache, as far as the system does that."""
    if hasattr(os, "posix_fadvise") and path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(nbytes: int, seconds: dict[str, list[float]]) -> None:
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors"
    title = f"{nbytes / 2**30:.2f} GiB, medians of {len(next(iter(seconds.values())))}{load}"
    table = Table("", "seconds", "GB/s", "of plain", title=title)
    for name, values in seconds.items():
        state = name.rpartition(", ")[2]
        other = "plain write" if "," not in name else f"plain read, {state}"
        median = statistics.median(values)
        ratio = statistics.median(values) / statistics.median(seconds[other])
        table.add_row(name, f"{median:.2f}", f"{nbytes / median / 1e9:.2f}", f"{ratio:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
