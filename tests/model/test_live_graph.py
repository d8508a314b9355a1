"""A live autograd graph over the weights: it would keep their bytes on the device, or meet them on
another one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.places import place_of


def inputs(**options: bool) -> torch.Tensor:
    return torch.ones(2, 64, device="cuda", **options)


def test_a_graph_that_trains_the_weights_is_refused_by_name(gpu: GPU) -> None:
    model = layers(2).requires_grad_(True)
    loss = model(inputs()).sum()

    with pytest.raises(qmove.LiveAutogradGraph, match=r"0\.weight|0\.bias"):
        qmove.park(model)

    assert model[0].weight.device == gpu.device
    loss.backward()
    assert model[0].weight.grad is not None


def test_a_graph_through_frozen_weights_is_refused_too(gpu: GPU) -> None:
    model = layers(2)
    output = model(inputs(requires_grad=True))

    with pytest.raises(qmove.LiveAutogradGraph, match=r"0\.weight"):
        qmove.move(model, "cpu")

    assert output.requires_grad


def test_it_may_be_parked_all_the_same_and_what_the_graph_keeps_is_reported(gpu: GPU) -> None:
    before = gpu.allocated()
    model = layers(2).requires_grad_(True)
    output = model(inputs())
    resident = gpu.allocated()

    parked = qmove.park(model, allow_live_graph=True)

    assert [straggler.name for straggler in parked.stragglers] == [
        "1.weight"
    ]  # the graph saved a view of it
    assert gpu.allocated() == resident - parked.nbytes + model[1].weight.nbytes
    del output
    assert gpu.allocated() == before


def test_a_model_whose_graph_is_gone_parks(gpu: GPU) -> None:
    model = layers(2).requires_grad_(True)
    loss = model(inputs()).sum()
    loss.backward()
    del loss

    assert qmove.park(model).stragglers == []
    assert model[0].weight.grad is not None
    assert place_of(model[0].weight.grad) == "cpu"


def test_graphs_of_other_models_do_not_hinder(gpu: GPU) -> None:
    model, other = layers(2), layers(2).requires_grad_(True)
    loss = other(inputs()).sum()

    assert qmove.park(model).stragglers == []
    assert loss.requires_grad


def test_a_tensor_of_the_model_that_only_says_how_it_was_made_is_parked(gpu: GPU) -> None:
    """As HQQ's bias, a clone of a parameter that trains: its graph has saved no value."""
    model = layers(1)
    model.shift = nn.Parameter(torch.ones(64, device="cuda")).clone().to(torch.float64)
    before, allocated = model.shift.detach().clone(), gpu.allocated()
    parked = qmove.park(model)
    assert parked.stragglers == [] and gpu.allocated() == allocated - parked.nbytes
    qmove.restore(model)
    assert torch.equal(model.shift, before) and model.shift.grad_fn is not None


def test_a_tensor_of_the_model_whose_graph_has_saved_a_weight_is_refused(gpu: GPU) -> None:
    model = layers(1)
    scale = torch.ones(64, device="cuda", requires_grad=True)
    model.kept = model[0].weight[0] * scale
    with pytest.raises(qmove.LiveAutogradGraph, match=r"0\.weight|kept"):
        qmove.park(model)
