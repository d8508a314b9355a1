"""Work that is queued on streams while models move: no weight is freed or overwritten too early."""

from __future__ import annotations

import threading

import torch
from torch import nn

import qmove_core as qmove

from .. import models
from ..checks import Checks
from ..machine import MIB, Sizes

CYCLES = 20_000_000  # of the card's clock: some 10 ms


def run(checks: Checks, sizes: Sizes) -> None:
    model = models.stack(min(sizes.model // 8, 256 * MIB))
    expected = models.output(model)
    assert expected is not None
    before = models.hashes(model)
    for place in ("the default stream", "a stream of the user", "another thread's stream"):
        wrong = sum(not _round(model, place, expected) for _ in range(sizes.rounds))
        checks.expect(
            f"a park while {place} still computes",
            wrong == 0,
            f"{wrong} of {sizes.rounds} outputs wrong",
            "streams",
        )
    checks.expect(
        "every byte is right after all rounds",
        models.hashes(model) == before,
        "",
        "exact",
        "streams",
    )


def _round(model: nn.Module, place: str, expected: torch.Tensor) -> bool:
    """Queues a slow forward, parks at once, and writes over the freed memory."""
    outputs: list[torch.Tensor] = []
    queued = threading.Event()

    def compute() -> None:
        stream = torch.cuda.default_stream(0) if place.startswith("the") else torch.cuda.Stream(0)
        inputs = torch.linspace(-1, 1, models.WIDTH, device="cuda:0").half().reshape(1, -1)
        stream.wait_stream(torch.cuda.current_stream(0))
        with torch.cuda.stream(stream), torch.inference_mode():
            torch.cuda._sleep(CYCLES)
            outputs.append(model(inputs))
        queued.set()

    if place.startswith("another"):
        thread = threading.Thread(target=compute)
        thread.start()
        queued.wait()
    else:
        thread = None
        compute()
    qmove.park(model)
    poison = torch.full((32 * MIB,), 0x7F, dtype=torch.uint8, device="cuda:0")
    if thread is not None:
        thread.join()
    torch.cuda.synchronize(0)
    right = torch.equal(outputs[0].cpu(), expected)
    del poison
    qmove.restore(model)
    return right
