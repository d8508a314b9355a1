"""Guarantee 5, Idempotent: parking a parked model and restoring a resident one do nothing."""

from __future__ import annotations

import pytest
import torch

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


def copies() -> int:
    counters = simcuda.counters()
    return counters.h2d_copies + counters.d2h_copies


def test_parking_a_parked_model_copies_nothing(gpu: GPU) -> None:
    model = layers()
    qmove.park(model)
    before, copied = [p.data_ptr() for p in model.parameters()], copies()

    again = qmove.park(model)

    assert (again.nbytes, again.copied_bytes, copies()) == (0, 0, copied)
    assert [p.data_ptr() for p in model.parameters()] == before
    assert again.restore().nbytes == sum(p.nbytes for p in model.parameters())


def test_restoring_a_resident_model_copies_nothing(gpu: GPU) -> None:
    model = layers()
    before, copied = [p.data_ptr() for p in model.parameters()], copies()

    assert qmove.restore(model).nbytes == 0

    assert copies() == copied
    assert [p.data_ptr() for p in model.parameters()] == before


def test_moving_a_model_to_where_it_is_copies_nothing(gpu: GPU) -> None:
    model = layers()
    copied = copies()

    assert qmove.move(model, "cuda:0").nbytes == 0
    assert copies() == copied
    qmove.move(model, "cpu")
    copied = copies()
    assert qmove.move(model, "cpu").nbytes == 0
    assert copies() == copied


def test_moving_a_parked_model_to_the_cpu_copies_nothing_and_it_runs_there(gpu: GPU) -> None:
    model = layers()
    expected = model(torch.ones(1, 64, device="cuda")).cpu()
    qmove.park(model)
    copied = copies()

    qmove.move(model, "cpu")

    assert copies() == copied
    assert not qmove.is_parked(model)
    assert torch.equal(model(torch.ones(1, 64)), expected)
    assert model[0].weight.device.type == "cpu"  # it did not wake


def test_what_has_come_onto_the_device_since_is_parked_too_and_all_of_it_comes_home(
    gpu: GPU,
) -> None:
    model = layers()
    qmove.park(model)
    model.cache = torch.ones(100, device="cuda")

    assert qmove.park(model).nbytes == 400
    assert gpu.allocated() == 0
    assert len(qmove.parked_models()) == 1
    qmove.restore(model)
    assert {holding.device for holding in qmove.inventory(model).holdings} == {gpu.device}


def test_ten_round_trips_change_nothing(gpu: GPU) -> None:
    model = layers()
    before = snapshot(model)

    for _ in range(10):
        qmove.park(model)
        qmove.restore(model)

    assert snapshot(model) == before
