"""`with parked(model)` and `with resident(model)`: parked or awake for a while, and then as before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.snapshots import snapshot


def run(body: Callable[[], None], fails: bool) -> None:
    """Runs `body`, which raises a KeyError if it is to fail."""
    if fails:
        with pytest.raises(KeyError, match="from the body"):
            body()
    else:
        body()


@pytest.mark.parametrize("fails", [False, True])
def test_parked_keeps_a_model_out_of_vram_for_a_while(gpu: GPU, fails: bool) -> None:
    empty = gpu.allocated()
    model = layers(2)
    before = snapshot(model)

    def body() -> None:
        with qmove.parked(model) as parked:
            assert parked.nbytes > 0
            assert gpu.allocated() == empty
            if fails:
                raise KeyError("from the body")

    run(body, fails)
    assert snapshot(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_resident_keeps_a_parked_model_awake_for_a_while(gpu: GPU, fails: bool) -> None:
    empty = gpu.allocated()
    model = layers(2)
    momentum = {"momentum": torch.ones(64, device="cuda")}
    qmove.park(model, extra=[momentum])

    def body() -> None:
        with qmove.resident(model):
            assert model[0].weight.device == momentum["momentum"].device == gpu.device
            if fails:
                raise KeyError("from the body")

    run(body, fails)
    assert qmove.is_parked(model)
    assert gpu.allocated() == empty
    model(inputs())
    assert momentum["momentum"].device == gpu.device


def test_resident_does_nothing_to_a_model_that_is_at_home(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)

    with qmove.resident(model) as restored:
        assert restored.nbytes == 0

    assert snapshot(model) == before
    assert not qmove.is_parked(model)
