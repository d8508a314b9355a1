"""What other streams and threads do with a device while a model leaves it, or comes."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import devices
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("way_out", ["park", "move", "swap"])
def test_what_another_threads_stream_still_reads_is_freed_only_afterwards(
    gpu: GPU, way_out: str
) -> None:
    """The allocator orders a free behind the stream of the allocation, and no other."""
    model, other_model = layers(4, width=256), layers(4, width=256)
    qmove.park(other_model)
    expected = [p.detach().cpu() for p in model.parameters()]
    seen = [torch.empty(p.shape).pin_memory() for p in model.parameters()]
    streams: list[Any] = []

    def read() -> None:
        streams.append(torch.cuda.Stream())
        with torch.cuda.stream(streams[0]):
            for target, weight in zip(seen, model.parameters(), strict=True):
                target.copy_(weight.detach(), non_blocking=True)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert simcuda.queued(streams[0])
    if way_out == "park":
        qmove.park(model)
    elif way_out == "move":
        qmove.move(model, "cpu")
    else:
        qmove.swap(model, other_model)
    streams[0].synchronize()  # raises for a copy that reads freed memory
    assert all(map(torch.equal, seen, expected))


def test_a_park_does_not_advance_in_lockstep_with_a_model_that_computes(gpu: GPU) -> None:
    """Each copy of a park queued behind what the default stream has by then would be as slow."""
    qmove.configure(keep_mirrors=False)
    model = layers(40, width=1024)  # 160 MiB: many copies
    simcuda.clock.reset()
    ends: list[float] = []
    out = devices.own_stream(gpu.device, "out")

    def compute(notice: simcuda.CopyNotice) -> None:
        if notice.direction == "d2h":
            ends.append(simcuda.clock.stream_ready(out))
            simcuda.clock.compute(1.0, torch.cuda.default_stream())

    with simcuda.on_copy(compute):
        qmove.park(model)
    assert len(ends) > 3
    assert max(ends) < 1.0, "no copy began behind a kernel that was queued after the park began"


def test_targets_wait_for_what_this_threads_stream_gave_up_just_before(gpu: GPU) -> None:
    """A block that the allocator hands out again is still written by what its stream has queued."""
    model = layers(4, width=512)
    before = snapshot(model)
    qmove.park(model)
    simcuda.clock.reset()
    started: list[float] = []

    def give_up(_notice: simcuda.CopyNotice) -> None:
        started.append(simcuda.clock.stream_ready(devices.own_stream(gpu.device, "in")))
        simcuda.clock.compute(1.0)  # on the current stream, before the next target is allocated

    with simcuda.on_copy(give_up):
        qmove.restore(model)
    assert all(b >= a + 1.0 for a, b in pairwise(started))
    assert snapshot(model) == before
