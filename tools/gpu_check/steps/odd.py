"""Odd surroundings: graph capture, a fork while memory is locked, compiled models."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager

import torch

import qmove_core as qmove

from .. import models
from ..checks import Checks
from ..machine import MIB, Sizes, is_simulated


def run(checks: Checks, sizes: Sizes) -> None:
    _capture(checks, sizes)
    _fork(checks, sizes)
    _compiled(checks, sizes)


def _capture(checks: Checks, sizes: Sizes) -> None:
    model = models.stack(sizes.model // 16)
    expected = models.output(model)
    inputs = torch.linspace(-1, 1, models.WIDTH, device="cuda:0").half().reshape(1, -1)
    qmove.park(model)
    refused = ""
    try:
        with torch.inference_mode(), _captured():
            model(inputs)
    except qmove.CapturingGraph as error:
        refused = str(error)
    checks.expect("a wake inside a graph capture is refused", bool(refused), refused, "graphs")
    torch.cuda.synchronize(0)
    again = models.output(model)
    assert expected is not None and again is not None
    checks.expect(
        "the model is right after it", torch.equal(again, expected), "", "graphs", "exact"
    )


def _captured() -> AbstractContextManager[object]:
    if is_simulated():  # which has no graphs, and refuses what a capture refuses
        import simcuda

        return simcuda.capturing()
    return torch.cuda.graph(torch.cuda.CUDAGraph())


def _fork(checks: Checks, sizes: Sizes) -> None:
    if not hasattr(os, "fork") or sys.platform == "darwin":
        checks.skip("a fork while memory is locked", "this system does not fork")
        return
    model = models.stack(sizes.model // 2)
    before = models.hashes(model)
    qmove.park(model)
    child = os.fork()
    if child == 0:
        os._exit(0)
    _pid, status = os.waitpid(child, 0)
    checks.expect("a forked child ends", status == 0, status, "fork")
    qmove.restore(model)
    checks.expect(
        "every byte is right after a fork", models.hashes(model) == before, "", "fork", "exact"
    )
    with torch.inference_mode():
        for tensor in model.parameters():
            tensor.mul_(2)
    changed = models.hashes(model)
    qmove.park(model)
    qmove.restore(model)
    checks.expect(
        "a park after a fork sees new bytes", models.hashes(model) == changed, "", "fork", "exact"
    )


def _compiled(checks: Checks, sizes: Sizes) -> None:
    if is_simulated():
        checks.skip("a compiled model", "no compiler makes kernels for the simulated GPU")
        return
    model = models.stack(min(sizes.model // 16, 16 * MIB))
    expected = models.output(model)
    assert expected is not None
    with checks.no_error(
        "a model compiled with CUDA graphs, parked and restored three times", "graphs"
    ):
        compiled = torch.compile(model, mode="reduce-overhead")
        inputs = torch.linspace(-1, 1, models.WIDTH, device="cuda:0").half().reshape(1, -1)
        first = None
        for _ in range(3):
            with torch.inference_mode():
                output = compiled(inputs).cpu()
            first = output if first is None else first
            checks.expect(
                "the compiled output stays the same",
                torch.equal(output, first),
                "",
                "graphs",
                "exact",
            )
            qmove.park(model)
            qmove.restore(model)
