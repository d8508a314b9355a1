"""Guarantee 1, Released: after a park the device holds 0 bytes of the model; what stayed is listed
with its holders."""

from __future__ import annotations

import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.places import place_of


def test_after_park_the_device_holds_nothing_of_the_model(gpu: GPU) -> None:
    before = gpu.allocated()
    model = layers()
    nbytes = gpu.allocated() - before

    parked = qmove.park(model)

    assert gpu.allocated() == before
    assert parked.nbytes == parked.copied_bytes == nbytes
    assert parked.stragglers == []
    assert {str(device) for device in parked.home.values()} == {"cuda:0"}
    assert all(place_of(parameter) == "cpu" for parameter in model.parameters())


def test_tensors_where_named_parameters_does_not_look_leave_too(gpu: GPU) -> None:
    before = gpu.allocated()

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(64, 64, device="cuda"), requires_grad=False)
            self.cache = {"keys": [torch.ones(32, device="cuda")]}
            table = torch.ones(16, device="cuda")
            self.register_forward_hook(lambda module, args, output: output + table[0])

    model = Attention()
    model.weight.grad = torch.ones(64, 64, device="cuda")

    qmove.park(model)

    assert gpu.allocated() == before


def test_a_view_leaves_with_the_base_that_keeps_its_storage_alive(gpu: GPU) -> None:
    before = gpu.allocated()
    model = nn.Module()
    model.absmax = torch.arange(64.0, device="cuda").reshape(8, 8)[
        2:4
    ]  # nobody but the view refers to the base

    qmove.park(model)

    assert gpu.allocated() == before


def test_an_alias_outside_the_model_is_taken_along_and_comes_home(gpu: GPU) -> None:
    before = gpu.allocated()
    model = layers(1)
    alias = model[0].weight.data

    parked = qmove.park(model)

    assert gpu.allocated() == before
    assert parked.stragglers == []
    assert alias.data_ptr() == model[0].weight.data_ptr()
    parked.restore()
    assert alias.device == gpu.device
    assert alias.data_ptr() == model[0].weight.data_ptr()


def test_a_storage_held_by_somebody_else_is_reported_with_name_and_holder(gpu: GPU) -> None:
    before = gpu.allocated()
    model = layers(1)
    weight_bytes = model[0].weight.nbytes

    class Exporter:
        pass

    exporter = Exporter()
    exporter.storage = model[0].weight.untyped_storage()

    parked = qmove.park(model)

    assert gpu.allocated() == before + weight_bytes
    [straggler] = parked.stragglers
    assert straggler.name == "0.weight"
    assert straggler.nbytes == weight_bytes
    assert straggler.device == gpu.device
    assert "Exporter" in " ".join(straggler.holders)
    assert "'storage'" in " ".join(straggler.holders)
    del exporter.storage
    assert gpu.allocated() == before


def test_bytes_that_only_an_autograd_graph_holds_are_reported(gpu: GPU) -> None:
    model = layers(1)
    inputs = torch.ones(2, 64, device="cuda", requires_grad=True)
    output = model(
        inputs
    )  # the graph saves a transposed view of the weight that never had a Python object

    parked = qmove.park(model, allow_live_graph=True)

    [straggler] = parked.stragglers
    assert straggler.name == "0.weight"
    assert "C++" in straggler.holders[0]
    assert output.grad_fn is not None


def test_stragglers_are_logged_as_a_warning(gpu: GPU, caplog) -> None:  # type: ignore[no-untyped-def]
    model = layers(1)
    kept = [model[0].bias.untyped_storage()]

    qmove.park(model)

    assert kept
    [warning] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "0.bias" in warning.getMessage()
    assert "cuda:0" in warning.getMessage()


def test_extra_roots_leave_and_come_home_with_the_model(gpu: GPU) -> None:
    before = gpu.allocated()
    model = layers(2).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 64, device="cuda")).sum().backward()
    optimizer.step()
    state = {id(t): t.cpu().clone() for s in optimizer.state.values() for t in s.values()}

    qmove.park(model, extra=[optimizer])
    assert gpu.allocated() == before

    qmove.restore(model)
    moments = [t for s in optimizer.state.values() for t in s.values()]
    assert any(t.device == gpu.device for t in moments)
    assert all(torch.equal(t.cpu(), state[id(t)]) for t in moments)


def test_an_alias_that_was_given_other_data_meanwhile_is_left_alone(gpu: GPU) -> None:
    model = layers(1)
    alias = model[0].weight.data
    parked = qmove.park(model)
    alias.data = torch.ones(3)

    parked.restore()

    assert alias.device.type == "cpu"
    assert model[0].weight.device == gpu.device
