"""Prefetch: a parked model begins to arrive where there is room for it, and stays parked where
there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.link import copies_queued
from tests.builders.models import inputs, layers
from tests.builders.snapshots import snapshot
from tests.builders.streaming import Timed, is_arriving

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


def test_prefetch_begins_where_there_is_room(gpu: GPU) -> None:
    model = layers(4)
    expected, parked = model(inputs()), qmove.park(model)
    begun = qmove.prefetch(model)
    assert begun is not None and begun.nbytes == parked.nbytes
    assert is_arriving() and copies_queued() > 0
    assert torch.equal(model(inputs()), expected)


def test_prefetch_leaves_a_model_parked_that_does_not_fit(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = layers(4), layers(4)
    parked = qmove.park(model)
    before = snapshot(model)
    simcuda.set_memory(torch.cuda.memory_allocated() + parked.nbytes - 1)
    asked: list[int] = []
    monkeypatch.setattr(
        "qmove_core.hosting._ask_for_room", [lambda _device, nbytes: asked.append(nbytes)]
    )
    assert qmove.prefetch(model) is None
    assert not asked, "nobody is to make room for it"
    assert qmove.is_parked(model) and not is_arriving()
    assert snapshot(model) == before
    assert not qmove.is_parked(other)


def test_prefetch_of_a_resident_model_does_nothing(gpu: GPU) -> None:
    model = layers(4)
    begun = qmove.prefetch(model)
    assert begun is not None and begun.nbytes == 0
    assert not is_arriving()


def test_prefetch_overlaps_with_what_another_model_computes(gpu: GPU) -> None:
    coming = nn.Sequential(*[Timed(0.0) for _ in range(4)])
    parked = qmove.park(coming)
    copying = parked.nbytes / simcuda.link.current().h2d_pinned
    simcuda.clock.reset()
    qmove.prefetch(coming)
    assert simcuda.clock.now() < copying / 4, "it returned at once"
    simcuda.clock.compute(2 * copying)  # the other model
    torch.cuda.synchronize()
    assert simcuda.clock.now() < 1.25 * 2 * copying
