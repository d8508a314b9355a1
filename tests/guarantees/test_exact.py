"""Guarantee 2, Exact: after a restore every byte, dtype, shape, stride, alias, subclass and
attribute is as before."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.odd_models import BUILDERS
from tests.builders.snapshots import snapshot


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("inside_inference_mode", [False, True])
def test_park_and_restore_change_nothing(gpu: GPU, build, inside_inference_mode: bool) -> None:  # type: ignore[no-untyped-def]
    model = build()
    before = snapshot(model)

    with torch.inference_mode(inside_inference_mode):
        qmove.park(model)
        assert {holding.device.type for holding in qmove.inventory(model).holdings} == {"cpu"}
        qmove.restore(model)

    assert snapshot(model) == before


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_move_to_the_cpu_and_back_changes_nothing_but_where_it_was_on_the_host(
    gpu: GPU, build
) -> None:  # type: ignore[no-untyped-def]
    model = build()
    before = snapshot(model)

    qmove.move(model, "cpu")
    qmove.move(model, "cuda:0")

    after = snapshot(model)
    assert {name: content[1:] for name, content in after.items()} == {
        name: c[1:] for name, c in before.items()
    }
    assert {content[0] for content in after.values()} == {"cuda:0"}


def test_attributes_hooks_and_requires_grad_survive(gpu: GPU) -> None:
    model = layers(1).requires_grad_(True)
    model[0].weight.scale = 0.5
    model[0].weight.register_hook(lambda grad: grad * 2)
    hooks = model[0].weight._backward_hooks

    qmove.park(model)
    qmove.restore(model)

    assert model[0].weight.scale == 0.5
    assert model[0].weight._backward_hooks is hooks
    model(torch.ones(1, 64, device="cuda")).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.ones(64, device="cuda"))
    assert torch.equal(model[0].weight.grad, torch.full((64, 64), 2.0, device="cuda"))


def test_what_is_written_while_parked_comes_home(gpu: GPU) -> None:
    model = layers(1)
    qmove.park(model)

    model[0].weight.data += 1
    expected = model[0].weight.clone()
    qmove.restore(model)

    assert model[0].weight.device == gpu.device
    assert torch.equal(model[0].weight.cpu(), expected)


def test_a_model_spread_over_two_devices_comes_back_exactly_so(gpu: GPU, second_gpu: GPU) -> None:
    model = nn.Sequential(
        layers(1, device="cuda:0"), layers(1, device="cuda:1"), layers(1, device="cpu")
    )
    before = snapshot(model)
    on_first, on_second = gpu.allocated(), second_gpu.allocated()

    parked = qmove.park(model)
    assert gpu.allocated() < on_first
    assert second_gpu.allocated() < on_second
    assert parked.home["0.0.weight"] == gpu.device
    assert parked.home["1.0.weight"] == second_gpu.device
    assert "2.0.weight" not in parked.home

    qmove.restore(model)
    assert snapshot(model) == before
    assert (gpu.allocated(), second_gpu.allocated()) == (on_first, on_second)


def test_restore_to_one_other_device(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(2, device="cuda:0")
    qmove.park(model)

    qmove.restore(model, "cuda:1")

    assert {p.device for p in model.parameters()} == {second_gpu.device}
    assert not qmove.is_parked(model)


def test_restore_by_a_device_map(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(3, device="cuda:0")
    qmove.park(model)

    qmove.restore(model, {"": "cuda:0", "1": "cuda:1", "2": "cpu"})

    assert [layer.weight.device for layer in model] == [
        gpu.device,
        second_gpu.device,
        torch.device("cpu"),
    ]
    assert not qmove.is_parked(model)
