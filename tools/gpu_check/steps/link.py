"""The link's real constants: bytes a second in both directions, from locked and pageable memory."""

from __future__ import annotations

import time

import torch

from ..checks import Checks
from ..machine import MIB, Sizes

REPEATS = 5
LAUNCHES = 1000


def run(checks: Checks, sizes: Sizes) -> None:
    nbytes = min(sizes.model, 1024 * MIB)
    device = torch.empty(nbytes, dtype=torch.uint8, device="cuda:0")
    pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    touched = torch.zeros(nbytes, dtype=torch.uint8)

    fresh = torch.empty(nbytes, dtype=torch.uint8)
    pageable_out = {
        "into fresh memory": _seconds(fresh, device),
        "into touched memory": _best(touched, device),
    }
    for where, seconds in pageable_out.items():
        checks.figure(f"device to host, pageable, {where}, GB/s", round(nbytes / seconds / 1e9, 2))
    small = torch.empty(1, dtype=torch.uint8, device="cuda:0")
    link = {
        "h2d_pinned": nbytes / _best(device, pinned),
        "d2h_pinned": nbytes / _best(pinned, device),
        "h2d_pageable": nbytes / _best(device, touched),
        "d2h_pageable": nbytes / pageable_out["into touched memory"],
        "host_copy": nbytes / _best(torch.zeros_like(touched), touched),
        "copy_latency": min(_seconds(small, pinned[:1]) for _ in range(50)),
        "launch": _launch_seconds(),
    }
    if torch.cuda.device_count() > 1:
        link["d2d"] = nbytes / _best(torch.empty_like(device, device="cuda:1"), device)
    for name, value in link.items():
        checks.figure(f"link: {name}", f"{value:.3g}")
    device.copy_(touched)
    checks.expect("the bytes arrive", torch.equal(device.cpu(), touched), "", "link")


def _best(target: torch.Tensor, source: torch.Tensor) -> float:
    return min(_seconds(target, source) for _ in range(REPEATS))


def _launch_seconds() -> float:
    """Seconds that the host takes to queue one small kernel."""
    target = torch.zeros(1, device="cuda:0")
    torch.cuda.synchronize(0)
    started = time.perf_counter()
    for _ in range(LAUNCHES):
        target.add_(1)
    seconds = time.perf_counter() - started
    torch.cuda.synchronize(0)
    return seconds / LAUNCHES


def _seconds(target: torch.Tensor, source: torch.Tensor) -> float:
    torch.cuda.synchronize(0)
    started = time.perf_counter()
    target.copy_(source, non_blocking=True)
    torch.cuda.synchronize(0)
    return time.perf_counter() - started
