"""Digests on the card: equal to those of the CPU for storages of many sizes, without a trace in
VRAM, and harmless where there is no room for them."""

from __future__ import annotations

import threading
import time

import torch

import qmove_core as qmove
from qmove_core.digests.digest import digest_storages

from .. import models
from ..checks import Checks
from ..machine import MIB, Sizes, settled_bytes

COUNTS = (1, 7, 512, 4096, 64 << 10, MIB - 1, MIB, 3 * MIB + 5, 8 * MIB, 24 * MIB)


def run(checks: Checks, sizes: Sizes) -> None:
    counts = [count for count in COUNTS if count <= sizes.model]
    torch.manual_seed(0)
    host = [torch.randint(0, 256, (count,), dtype=torch.uint8) for count in counts]
    on_card = [tensor.cuda() for tensor in host]
    before = settled_bytes()
    _compare(checks, "in this thread", host, on_card)
    other = threading.Thread(target=_compare, args=(checks, "in a new thread", host, on_card))
    other.start()
    other.join()
    with torch.cuda.stream(torch.cuda.Stream()):
        _compare(checks, "on a stream of its own", host, on_card)
    changed = on_card[-1].clone()
    changed[changed.numel() // 2] ^= 1
    with checks.no_error("a changed bit changes the digest", "digests"):
        first, second = digest_storages([t.untyped_storage() for t in (on_card[-1], changed)])
        checks.expect("the digests differ", first != second, "", "digests")
    del changed
    _time(checks, on_card[-1])
    _full_card(checks, sizes)
    del on_card
    model = models.stack(sizes.model // 4)
    qmove.park(model)
    qmove.restore(model)
    qmove.park(model)
    left = settled_bytes() - (before - sum(counts))
    # Small tables of the digest may stay; a workspace of cuBLAS takes 8 MiB and more.
    checks.expect(
        "nothing of qmove's stays in VRAM after a park",
        left < MIB,
        f"{left} bytes",
        "digests",
        "released",
    )


def _compare(
    checks: Checks, where: str, host: list[torch.Tensor], on_card: list[torch.Tensor]
) -> None:
    expected = digest_storages([tensor.untyped_storage() for tensor in host])
    found = digest_storages([tensor.untyped_storage() for tensor in on_card])
    if None in found:
        checks.skip(f"digests equal those of the CPU, {where}", "there are none: the log says why")
        return
    checks.expect(f"digests equal those of the CPU, {where}", found == expected, "", "digests")


def _time(checks: Checks, tensor: torch.Tensor) -> None:
    storages = [tensor.untyped_storage()] * 8
    if None in digest_storages(storages):
        return
    started = time.perf_counter()
    digest_storages(storages)
    rate = sum(storage.nbytes() for storage in storages) / (time.perf_counter() - started)
    checks.figure("digests, GB/s", round(rate / 1e9, 1))


def _full_card(checks: Checks, sizes: Sizes) -> None:
    """With 0, 1, 10 and 40 MiB left a park works, with digests or without."""
    for left in (0, 1, 10, 40):
        model = models.stack(min(sizes.model // 4, 256 * MIB))
        expected = models.hashes(model)
        ballast = []
        reserve = torch.empty(max(left, 1) * MIB, dtype=torch.uint8, device="cuda:0")
        step = sizes.model
        while step >= MIB // 2:
            try:
                ballast.append(torch.empty(step, dtype=torch.uint8, device="cuda:0"))
            except torch.OutOfMemoryError:
                step //= 2
        if left:
            del reserve
        with checks.no_error(f"park and restore with {left} MiB free", "digests", "out of memory"):
            qmove.park(model)
            qmove.restore(model)
            qmove.park(model)
        del ballast
        with checks.no_error(f"the way home after {left} MiB free", "digests", "out of memory"):
            qmove.restore(model)
            same = models.hashes(model) == expected
            checks.expect(f"every byte is right after {left} MiB free", same, "", "exact")
        del model
