"""What goes over the simulated link: the copies that are made, and those that are queued."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

import simcuda
from qmove_core import devices


def copies_queued() -> int:
    """Jobs that the stream of what comes in has still to run."""
    return simcuda.queued(devices.own_stream(torch.device("cuda", 0), "in"))


@contextmanager
def copies_in() -> Iterator[list[int]]:
    """Notes the bytes of each copy that comes in, in order."""
    seen: list[int] = []

    def note(notice: simcuda.CopyNotice) -> None:
        if notice.direction == "h2d":
            seen.append(notice.nbytes)

    with simcuda.on_copy(note):
        yield seen


@contextmanager
def copies() -> Iterator[list[simcuda.CopyNotice]]:
    """Notes each copy over the link."""
    seen: list[simcuda.CopyNotice] = []
    with simcuda.on_copy(seen.append):
        yield seen
