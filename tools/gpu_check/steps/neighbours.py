"""Other GPUs of the machine: nothing is allocated there, and no context is made."""

from __future__ import annotations

import threading

import torch

import qmove_core as qmove
from qmove_core import devices

from .. import models
from ..checks import Checks
from ..machine import MIB, Sizes


def run(checks: Checks, sizes: Sizes) -> None:
    count = torch.cuda.device_count()
    if count < 2:
        checks.skip("other GPUs are left alone", "this machine has one GPU")
        return
    home = count - 1
    model = models.stack(min(sizes.model // 8, 64 * MIB), f"cuda:{home}")
    before = _contexts(count)
    checks.figure("contexts before", before)

    def move() -> None:
        with checks.no_error(f"park and restore on cuda:{home} from a new thread", "devices"):
            qmove.park(model)
            qmove.restore(model)
            qmove.park(model)
            qmove.stats()

    thread = threading.Thread(target=move)
    thread.start()
    thread.join()
    after = _contexts(count)
    checks.expect(
        "no context is made on a GPU that the model does not use",
        before == after,
        f"{before} before, {after} after",
        "devices",
    )
    others = [index for index in after if index != home]
    taken = sum(torch.cuda.memory_allocated(index) for index in others)
    checks.expect("nothing is allocated on other GPUs", taken == 0, f"{taken} bytes", "devices")


def _contexts(count: int) -> list[int]:
    """The GPUs on which this process has a context."""
    return [index for index in range(count) if devices.has_context(torch.device("cuda", index))]
