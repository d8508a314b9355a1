"""How fast a model that lies on the disk comes into RAM: qmove, accelerate's own way, and loading
it again.

    python benchmarks/materialize.py [--gib 2] [--folder FOLDER] [--rounds 3]

Everything runs on the CPU. "cold" drops the files from the page cache first (`posix_fadvise`);
where the system does not do that, the figure says so. "own RAM" is memory that does not go away
with the page cache.
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
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table

import qmove_core as qmove


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to write it; a folder that has it already is used as it is",
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qmove-benchmark-") as temporary:
        folder = arguments.folder or Path(temporary)
        if not any(folder.glob("*.safetensors")):
            save_model(folder, arguments.gib)
        measure(folder, arguments.rounds)


def save_model(folder: Path, gib: float) -> None:
    """A Llama in float16 of about `gib` GiB with random weights, in files of 500 MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = max(1, round((gib - 0.25) * 2**30 / 2 / 51.4e6))
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.uniform_(-0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="500MB")
    os.sync()


def dispatched(folder: Path) -> Any:
    """All but the rotary embedding on the disk, as `from_pretrained` does it."""
    from transformers import LlamaForCausalLM

    places = {
        "model.embed_tokens": "disk",
        "model.layers": "disk",
        "model.norm": "disk",
        "lm_head": "disk",
    }
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map={**places, "model.rotary_emb": "cpu"}
    )


def with_qmove(model: Any) -> Any:
    return qmove.materialize_meta_tensors(model)


def with_qmove_once(model: Any) -> Any:
    """`with materialized(model)`: digests are taken, to see changes."""
    context = qmove.materialized(model)
    context.__enter__()
    model.context = context  # left open: only the way in is measured
    return model


def with_accelerate(model: Any) -> Any:
    """What accelerate does with each weight before a forward, and no `post_forward` after it."""
    from accelerate.utils import set_module_tensor_to_device

    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and hook.offload:
            for name in [*module._parameters]:
                if getattr(module, name) is not None:
                    set_module_tensor_to_device(module, name, "cpu", value=hook.weights_map[name])
    touch(model)
    return model


def again(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16)
    touch(model)
    return model


def touch(model: Any) -> None:
    """Maps are read when they are used; without this nothing would have been read."""
    for parameter in model.parameters():
        parameter.detach().view(-1).view(torch.uint8)[::4096].sum()


def drop_from_page_cache(folder: Path) -> bool:
    """Whether the system let go of the files."""
    if not hasattr(os, "posix_fadvise"):
        return False
    before = cached_bytes()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return before - cached_bytes() > 0


def cached_bytes() -> int:
    return _kib("/proc/meminfo", "Cached:") * 1024


def own_ram() -> int:
    return _kib("/proc/self/status", "RssAnon:") * 1024


def _kib(file: str, key: str) -> int:
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def measure(folder: Path, rounds: int) -> None:
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    ways: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "qmove.materialize_meta_tensors": (lambda: dispatched(folder), with_qmove),
        "with qmove.materialized": (lambda: dispatched(folder), with_qmove_once),
        "accelerate, weight by weight": (lambda: dispatched(folder), with_accelerate),
        "from_pretrained again": (lambda: folder, again),
    }
    table = Table(
        title=f"{nbytes / 2**30:.2f} GiB in {len(list(folder.glob('*.safetensors')))} files, median of {rounds}"
    )
    for heading in ("", "warm", "GB/s", "cold", "GB/s", "own RAM"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, (prepare, run) in ways.items():
        warm, cold, ram, dropped = [], [], 0, True
        for is_cold in [False, *[False, True] * rounds]:  # the first warms up
            subject = prepare()
            gc.collect()
            dropped &= drop_from_page_cache(folder) if is_cold else True
            before, started = own_ram(), time.perf_counter()
            subject = run(subject)
            seconds = time.perf_counter() - started
            ram = max(0, own_ram() - before)
            (cold if is_cold else warm).append(seconds)
            del subject
        warm_seconds, cold_seconds = statistics.median(warm[1:]), statistics.median(cold)
        table.add_row(
            *(name, f"{warm_seconds:.2f} s", f"{nbytes / warm_seconds / 1e9:.1f}"),
            *(
                f"{cold_seconds:.2f} s" if dropped else "not dropped",
                f"{nbytes / cold_seconds / 1e9:.1f}",
            ),
            f"{ram / 2**20:.0f} MiB",
        )
    Console(width=110).print(table)
    with Progress(
        "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn()
    ) as bar:
        task = bar.add_task("materializing")
        qmove.materialize_meta_tensors(
            dispatched(folder),
            progress=lambda done, in_all: bar.update(task, completed=done, total=in_all),
        )


if __name__ == "__main__":
    main()
