"""What a parked model looks like, what copies of it are, and what is changed in it comes home."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import inputs, layers, tiny_diffusion
from tests.builders.places import places

# What a parked model looks like ------------------------------------------------------------------


class Placed(nn.Module):
    """Like a model of transformers or diffusers: names its device by its first parameter."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, device=first).requires_grad_(False)
        self.second = nn.Linear(8, 8, device=second).requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


@pytest.mark.parametrize(
    ("first", "second"), [("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")]
)
def test_device_is_what_it_was_before_the_park(gpu: GPU, first: str, second: str) -> None:
    model = Placed(first, second)

    qmove.park(model)

    assert str(model.device) == first
    assert places(model) == {"cpu"}


def test_a_device_that_a_model_knows_by_itself_is_left_alone(gpu: GPU) -> None:
    class Knowing(nn.Linear):
        @property
        def device(self) -> torch.device:
            return torch.device("meta")

    model = Knowing(8, 8, device="cuda")
    qmove.park(model)

    assert model.device == torch.device("meta")


def test_a_parked_model_looks_like_itself(gpu: GPU) -> None:
    model = layers(2)
    as_text, names = repr(model), dir(model)

    qmove.park(model)

    assert repr(model) == as_text
    assert dir(model) == names
    assert type(model).__name__ == "Sequential"
    assert type(model).__qualname__ == nn.Sequential.__qualname__
    assert type(model).__module__ == nn.Sequential.__module__
    assert model.__class__ is nn.Sequential
    assert isinstance(model, nn.Sequential)
    assert isinstance(model[0], nn.Linear)
    assert model.training
    assert len(model) == 2


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle protocol 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_a_copy_of_a_parked_model_is_an_ordinary_model(
    gpu: GPU, make_copy: Callable[[Any], Any]
) -> None:
    model = layers(2)
    expected = model(inputs()).cpu()
    qmove.park(model)

    copied = make_copy(model)

    assert qmove.is_parked(model)
    assert not qmove.is_parked(copied)
    assert [type(module) for module in copied.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    assert torch.equal(copied.cuda()(inputs()).cpu(), expected)
    assert qmove.is_parked(model)
    assert torch.equal(model(inputs()).cpu(), expected)


@pytest.mark.parametrize("what", ["the model", "its state_dict"])
def test_a_parked_model_can_be_saved(gpu: GPU, what: str) -> None:
    model = layers(2)
    expected = model(inputs()).cpu()
    qmove.park(model)
    file = io.BytesIO()

    torch.save(model if what == "the model" else model.state_dict(), file)

    assert file.tell() < 2 * sum(
        parameter.nbytes for parameter in model.parameters()
    )  # not the arena with each tensor
    file.seek(0)
    loaded = torch.load(file, weights_only=what != "the model")
    if what != "the model":
        state, loaded = loaded, layers(2, device="cpu")
        loaded.load_state_dict(state)
    assert type(loaded) is nn.Sequential
    assert torch.equal(loaded.cuda()(inputs()).cpu(), expected)
    assert qmove.is_parked(model)


def test_a_deep_copy_of_a_parked_pipeline(gpu: GPU) -> None:
    pipe = tiny_diffusion()
    own = type(pipe.unet)
    qmove.park(pipe)

    copied = copy.deepcopy(pipe)

    assert type(copied.unet) is own
    assert not qmove.is_parked(copied)
    assert qmove.is_parked(pipe)


def test_an_instance_made_from_the_class_of_a_parked_model_is_usable(gpu: GPU) -> None:
    model = layers(1)
    qmove.park(model)

    for cls in (type(model[0]), model[0].__class__):
        other = cls(4, 4)
        assert other(torch.ones(1, 4)).shape == (1, 4)
        assert type(other) is nn.Linear
    assert qmove.is_parked(model)


# Changed while parked ----------------------------------------------------------------------------


def test_what_is_loaded_while_parked_comes_home(gpu: GPU) -> None:
    model, other = layers(2), layers(2, device="cpu")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    parameters = list(model.parameters())
    qmove.park(model)

    model.load_state_dict(other.state_dict())

    assert torch.equal(model(inputs()).cpu(), other.cuda()(inputs()).cpu())
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, lambda model: {"a": model}, lambda model: [model]],
    ids=["module", "dict", "list"],
)
@pytest.mark.parametrize("how", ["restored", "woken"])
def test_a_parameter_that_is_replaced_while_parked_goes_to_the_home_of_its_name(
    gpu: GPU, wrap: Any, how: str
) -> None:
    model = layers(2)
    root = wrap(model)
    qmove.park(root)

    model[1].bias = nn.Parameter(torch.full((64,), 3.0), requires_grad=False)
    if how == "restored":
        qmove.restore(root)
    else:
        model(inputs())

    assert model[1].bias.device == gpu.device
    assert torch.equal(model[1].bias, torch.full((64,), 3.0, device="cuda"))
    assert not qmove.is_parked(model)


def test_a_cast_of_a_parked_model_comes_home(gpu: GPU) -> None:
    model = layers(2)
    expected = layers(2).half()(inputs().half())
    qmove.park(model)

    model.half()

    assert torch.equal(model(inputs().half()), expected)
    assert {parameter.device for parameter in model.parameters()} == {gpu.device}


def test_plain_to_brings_a_parked_model_home_as_well(gpu: GPU) -> None:
    model = layers(2)
    expected = model(inputs())
    qmove.park(model)

    model.to("cuda")

    assert torch.equal(model(inputs()), expected)
    assert not qmove.is_parked(model)
    assert type(model[0]) is nn.Linear
