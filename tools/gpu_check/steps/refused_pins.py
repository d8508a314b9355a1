"""A refused registration leaves nothing behind: the next operators, frees and waits of the thread
raise nothing, also with the card full."""

from __future__ import annotations

import mmap

import torch

from qmove_core.memory import pinning

from ..checks import Checks
from ..machine import MIB, Sizes


def run(checks: Checks, sizes: Sizes) -> None:
    torch.zeros(1, device="cuda:0")
    memory = mmap.mmap(-1, MIB)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    if not pinning.register(view.data_ptr(), MIB):
        checks.skip("a refused registration", "nothing can be locked here at all")
        return
    _refuse_twice(checks, "with room", view)
    _refuse_twice(checks, "with the card full", view, full=sizes)
    checks.expect("unlocked", pinning.unregister(view.data_ptr()), "", "pins")


def _refuse_twice(checks: Checks, when: str, view: torch.Tensor, full: Sizes | None = None) -> None:
    kept = torch.zeros(8, device="cuda:0")
    freed = torch.zeros(8, device="cuda:0")
    result = torch.zeros((), device="cuda:0")
    _ballast = [] if full is None else _fill(full)
    torch.cuda.synchronize(0)
    # A part of it again: the driver refuses memory that is registered already.
    again = pinning.register(view.data_ptr() + mmap.PAGESIZE, mmap.PAGESIZE)
    checks.expect(f"registering twice is refused, {when}", not again, "", "pins")
    with checks.no_error(f"nothing is raised after a refused registration, {when}", "pins"):
        del freed
        kept.add_(1)
        torch.cuda.synchronize(0)
        torch.sum(kept, dim=0, out=result)
        float(result)
        torch.cuda.Event().record()
        torch.cuda.synchronize(0)


def _fill(sizes: Sizes) -> list[torch.Tensor]:
    """Takes the VRAM to less than 1 MiB."""
    ballast, step = [], max(64 * MIB, sizes.model)
    while step >= MIB // 2:
        try:
            ballast.append(torch.empty(step, dtype=torch.uint8, device="cuda:0"))
        except torch.OutOfMemoryError:
            step //= 2
    return ballast
