"""A parked wrapper of torchao answers that it is home, as the tensor inside it does.

Its library finds it on the host, as it is: it can be detached, copied, saved and moved.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.class_variants import own_class
from tests.builders.device import GPU
from tests.builders.models import torchao_layers
from tests.builders.places import places

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning"),
]

MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "int8": lambda: torchao_layers("int8"),
    "int4": lambda: torchao_layers("int4"),
    "float8": lambda: torchao_layers("float8"),
    "nf4": lambda: torchao_layers("nf4"),
}
every_model = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


def x_of(model: Any) -> torch.Tensor:
    return torch.linspace(-1, 1, 256, device="cuda").reshape(2, 128).to(model[0].bias.dtype)


def values(weight: Any) -> torch.Tensor:
    name = "quantized_data" if hasattr(weight, "quantized_data") else "qdata"
    inner: torch.Tensor = getattr(weight, name)
    return inner.view(torch.uint8)


def saved(model: nn.Module) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return dict(torch.load(file, map_location="cuda", weights_only=False))


@every_model
def test_it_answers_that_it_is_home_and_stays_parked(
    gpu: GPU, build: Callable[[], nn.Sequential]
) -> None:
    model = build()
    before = gpu.allocated()
    cls = type(model[0].weight)
    qmove.park(model)
    weight = model[0].weight
    for tensor in (weight, weight.detach(), model.state_dict()["0.weight"], weight.data):
        assert (tensor.device, tensor.is_cuda, tensor.is_cpu) == (gpu.device, True, False)
        assert isinstance(tensor, cls) and tensor.__class__ is own_class(tensor)
    assert weight.get_device() == 0
    assert qmove.is_parked(model) and places(model) == {"cpu"} and gpu.allocated() < before
    qmove.restore(model)
    assert type(model[0].weight) is cls and places(model) == {"cuda"}


@every_model
def test_a_copy_of_it_is_used_as_one_of_a_weight_that_is_home(
    gpu: GPU, build: Callable[[], nn.Sequential]
) -> None:
    model = build()
    expected = model(x_of(model))
    qmove.park(model)
    other = copy.deepcopy(model)
    assert {parameter.device for parameter in other.parameters()} == {gpu.device}
    assert torch.equal(other(x_of(other)), expected)
    assert torch.equal(model(x_of(model)), expected)


@every_model
def test_it_is_saved_and_sent_to_the_host(gpu: GPU, build: Callable[[], nn.Sequential]) -> None:
    model = build()
    expected = model(x_of(model))
    qmove.park(model)
    loaded, on_host = saved(model), model[0].weight.to("cpu")
    assert qmove.is_parked(model)
    assert {type(tensor) for tensor in loaded.values()} == {
        own_class(tensor) for tensor in model.state_dict().values()
    }
    assert (on_host.device.type, type(on_host)) == ("cpu", own_class(model[0].weight))
    assert torch.equal(model(x_of(model)), expected)
    assert on_host.device.type == "cpu"
    assert torch.equal(values(on_host), values(model[0].weight).cpu())


@every_model
def test_it_is_sent_home_itself(gpu: GPU, build: Callable[[], nn.Sequential]) -> None:
    model, twin = build(), build()
    qmove.park(model)
    sent = model[0].weight.to("cuda")
    wanted = twin[0].weight.to("cuda")
    assert (sent is model[0].weight) == (wanted is twin[0].weight)
    assert sent.device == wanted.device and torch.equal(values(sent), values(wanted))
