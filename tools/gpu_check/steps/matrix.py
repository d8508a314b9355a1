"""Every kind of model through every move: bytes, outputs, VRAM, host memory and seconds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import psutil
import torch
from torch import nn

import qmove_core as qmove

from .. import models
from ..checks import Checks
from ..machine import MIB, Sizes, free_seen_by_others, settled_bytes

ROUNDING = 512  # bytes; what PyTorch's allocator rounds each block up to


def run(checks: Checks, sizes: Sizes) -> None:
    for kind, (package, make) in models.kinds(sizes.model, sizes.many).items():
        if not models.is_installed(package):
            checks.skip(kind, f"{package} is not installed")
            continue
        model = None
        with checks.no_error(f"{kind}: can be made", kind):
            model = make()
        if model is not None:
            _moves(checks, kind, model)
            model = None
            gc.collect()
            qmove.trim()
    _swap(checks, sizes)


def _moves(checks: Checks, kind: str, model: nn.Module) -> None:
    output = models.output(model)  # first: int8 layers change their state in their first forward
    before = models.hashes(model)
    allocated = settled_bytes()
    nbytes = qmove.inventory(model).nbytes

    def is_as_before(what: str) -> None:
        same = models.hashes(model) == before
        checks.expect(f"{kind}: every byte is right after {what}", same, "", "exact", kind)
        again = models.output(model)
        if output is not None and again is not None:
            checks.expect(
                f"{kind}: same output after {what}", torch.equal(again, output), "", "exact", kind
            )

    with checks.no_error(f"{kind}: all moves run", kind):
        qmove.prepare(model)
        free = free_seen_by_others()
        parked = _timed(checks, f"{kind}: first park", nbytes, lambda: qmove.park(model))
        left = settled_bytes() - (allocated - parked.nbytes)
        slack = ROUNDING * len(parked.home)
        checks.expect(
            f"{kind}: 0 bytes stay in VRAM", left <= slack, f"{left} bytes left", "released", kind
        )
        checks.expect(
            f"{kind}: nothing is held back",
            not parked.stragglers,
            parked.stragglers,
            "released",
            kind,
        )
        seen = free_seen_by_others()
        if free is not None and seen is not None:
            freed = seen - free
            checks.expect(
                f"{kind}: other processes see the room",
                freed >= parked.nbytes - 64 * MIB,
                f"{freed} of {parked.nbytes} bytes",
                "released",
                kind,
            )
        torch.cuda.reset_peak_memory_stats(0)
        low = settled_bytes()
        _timed(checks, f"{kind}: restore", nbytes, lambda: qmove.restore(model))
        extra = torch.cuda.max_memory_allocated(0) - low - parked.nbytes
        checks.expect(
            f"{kind}: a restore takes the model's own bytes",
            extra <= slack + 40 * MIB,
            f"{extra} bytes more",
            "bounded",
            kind,
        )
        is_as_before("a restore")
        again = _timed(checks, f"{kind}: second park", nbytes, lambda: qmove.park(model))
        checks.expect(
            f"{kind}: the second park copies nothing",
            again.copied_bytes == 0,
            f"{again.copied_bytes} bytes copied",
            "mirrors",
            kind,
        )
        if output is not None:
            woken = models.output(model)
            checks.expect(
                f"{kind}: a use wakes it, with the same output",
                woken is not None and torch.equal(woken, output),
                "",
                "exact",
                kind,
            )
            qmove.restore(model)
        qmove.park(model)
        qmove.restore(model, stream=True)
        is_as_before("a streaming restore")
    with checks.no_error(f"{kind}: a parked model can be given up", kind):
        qmove.park(model)
    process = psutil.Process()
    checks.figure(
        f"{kind}: resident host memory while parked, MiB", process.memory_info().rss // MIB
    )


def _swap(checks: Checks, sizes: Sizes) -> None:
    first, second = models.stack(sizes.model // 2), models.stack(sizes.model // 2)
    hashes = models.hashes(first), models.hashes(second)
    with checks.no_error("swap: both ways", "swap"):
        qmove.park(second)
        qmove.swap(first, second)
        qmove.swap(second, first)
        qmove.restore(second)
    same = (models.hashes(first), models.hashes(second)) == hashes
    checks.expect("swap: every byte of both is right", same, "", "swap", "exact")


def _timed(checks: Checks, name: str, nbytes: int, move: Callable[[], qmove.Moved]) -> qmove.Moved:
    torch.cuda.synchronize(0)
    started = time.perf_counter()
    result = move()
    torch.cuda.synchronize(0)
    seconds = time.perf_counter() - started
    checks.figure(name, f"{seconds:.3f} s, {nbytes / max(seconds, 1e-9) / 1e9:.1f} GB/s")
    return result
