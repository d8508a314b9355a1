"""What comes into a parked model, or changes in it, is there when it wakes, where its neighbours live.

Each change is made to a parked model and to its twin that was never parked; what each of them gives,
and where it says that its tensors live, must be the same, and the next park leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.formats import MODELS, Model, plain, x_of
from tests.builders.places import places

pytestmark = pytest.mark.simulated


class Adapter(nn.Module):
    """As peft wraps a layer."""

    def __init__(self, base: nn.Module, inside: int, outside: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = base
        torch.manual_seed(3)
        self.lora_a = nn.Linear(inside, 4, bias=False, dtype=dtype).requires_grad_(False)
        self.lora_b = nn.Linear(4, outside, bias=False, dtype=dtype).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def put_adapter(model: Model) -> None:
    model.base = Adapter(model.base, model.inside, model.last.in_features, model.dtype)
    model.base.lora_a.to(model.base.base_layer.weight.device)
    model.base.lora_b.to(model.first.weight.device)


def put_adapter_on_the_host(model: Model) -> None:
    model.base = Adapter(model.base, model.inside, model.last.in_features, model.dtype)
    settle_twin(model, model.base)


def settle_twin(model: Model, module: nn.Module) -> None:
    """On a model that is home its user brings what is new to the device."""
    if not qmove.is_parked(model):
        module.to("cuda")


def new_child(model: Model) -> None:
    width = model.last.in_features
    model.last = nn.Sequential(nn.LayerNorm(width, dtype=model.dtype), model.last)
    settle_twin(model, model.last)


def new_buffer(model: Model) -> None:
    model.register_buffer("more", torch.arange(model.last.in_features, dtype=model.dtype))
    settle_twin(model, model)
    model.register_forward_hook(lambda module, _x, y: y + module.more)


def replace(model: Model) -> None:
    torch.manual_seed(4)
    weight = torch.randn_like(model.first.weight.cpu())
    model.first.weight = nn.Parameter(weight, requires_grad=False)
    settle_twin(model, model)


def replace_by_its_own(model: Model) -> None:
    model.first.weight = nn.Parameter(model.first.weight.data * 2, requires_grad=False)


def send_an_adapter_away_and_back(model: Model) -> None:
    put_adapter(model)
    model.spare.to("cpu")
    model.base.lora_a.to("cpu")
    model.base.lora_a.to("cuda")


def share(model: Model) -> None:
    model.first.bias = nn.Parameter(model.first.weight.data[0])


def assign(model: Model) -> None:
    part = model.first
    part.load_state_dict({name: t * 3 for name, t in part.state_dict().items()}, assign=True)


CHANGES: dict[str, Callable[[Model], Any]] = {
    "nothing": lambda model: None,
    "an adapter": put_adapter,
    "an adapter on the host": put_adapter_on_the_host,
    "a new child": new_child,
    "a new buffer": new_buffer,
    "a replaced parameter": replace,
    "a parameter made of its own data": replace_by_its_own,
    "an exchanged data": lambda model: setattr(
        model.first.weight, "data", model.first.weight.data.flip(0)),
    "a spare adapter on the host": send_an_adapter_away_and_back,
    "a shared storage": share,
    "a tie": lambda model: setattr(model.first, "bias", nn.Parameter(model.first.weight[1])),
    "a removed bias": lambda model: setattr(model.last, "bias", None),
    "in place": lambda model: model.first.weight.mul_(2),
    "in place through data": lambda model: model.first.weight.data.add_(0.5),
    "in place from the device": lambda model: model.first.bias.copy_(
        torch.ones(model.inside, device="cuda")),
    "loaded": lambda model: model.first.load_state_dict(
        {name: t.cpu() + 1 for name, t in model.first.state_dict().items()}),
    "assigned": assign,
    "resized": lambda model: (model.scale.resize_(1), model.scale.fill_(3)),
    "cast and cast back": lambda model: (model.first.double(), model.first.to(model.dtype)),
    "cast of one layer": lambda model: (
        model.first.double(), model.first.register_forward_pre_hook(lambda m, x: x[0].double()),
        model.first.register_forward_hook(lambda m, x, y: y.to(model.dtype))),
    "one layer to the host and back": lambda model: (model.first.cpu(), model.first.cuda()),
    "one layer to the other device": lambda model: (
        model.first.to("cuda:1"),
        model.first.register_forward_pre_hook(lambda m, x: x[0].to("cuda:1")),
        model.first.register_forward_hook(lambda m, x, y: y.to("cuda:0"))),
    "one layer to the host": lambda model: (
        model.first.float().to("cpu"),
        model.first.register_forward_pre_hook(lambda m, x: x[0].float().cpu()),
        model.first.register_forward_hook(lambda m, x, y: y.to("cuda:0", model.dtype))),
    "partly used": lambda model: model.first(x_of(model)),
}  # fmt: skip


def lives(model: nn.Module) -> dict[str, Any]:
    return {
        name: (tensor.device, tensor.dtype, tensor.shape, tensor.__class__)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_gives_what_it_gives_on_a_model_that_was_never_parked(
    gpu: GPU, second_gpu: GPU, change: Callable[[Model], Any], build: Callable[[], Model]
) -> None:
    twin = build()
    change(twin)
    try:
        expected, wanted = twin(x_of(twin)), lives(twin)
    except RuntimeError as error:  # a tied weight that is cast or moved in one place
        pytest.skip(f"it does not run on a model that was never parked either: {error}")
    pipe = {"model": build(), "other": nn.Linear(8, 8).cuda()}
    model = pipe["model"]
    model(x_of(model))
    qmove.park(pipe)

    change(model)

    for _ in range(2):
        assert torch.equal(model(x_of(model)), expected)
    streaming.wait_for()
    assert lives(model) == wanted
    assert places(pipe["other"]) == {"cpu"}
    assert not qmove.park(pipe).stragglers
    assert set(qmove.inventory(pipe).by_device) == {"cpu"}
    assert torch.equal(model(x_of(model)), expected)
    streaming.wait_for()
    assert lives(model) == wanted


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("device", ["cuda:1", "cuda:0"])
def test_a_parked_model_goes_where_its_owner_says(
    gpu: GPU, second_gpu: GPU, device: str, build: Callable[[], Model]
) -> None:
    twin, model = build(), build()
    try:
        expected = twin.to(device)(x_of(twin).to(device))
    except RuntimeError as error:  # int8 leaves its state behind
        pytest.skip(f"it does not run on a model that was never parked either: {error}")
    qmove.park(model)
    model.to(device)
    assert torch.equal(model(x_of(model).to(device)), expected)
    streaming.wait_for()
    assert lives(model) == lives(twin)
    assert not qmove.is_parked(model)
    qmove.park(model)
    assert set(qmove.inventory(model).by_device) == {"cpu"}
    assert torch.equal(model(x_of(model).to(device)), expected)


def test_a_parked_model_that_is_sent_to_the_host_runs_there(gpu: GPU) -> None:
    empty = gpu.allocated()
    twin, model = plain().to("cpu"), plain()
    qmove.park(model)
    model.to("cpu")
    x = x_of(model).cpu()
    assert torch.equal(model(x), twin(x))
    assert lives(model) == lives(twin)
    assert gpu.allocated() == empty and not qmove.is_parked(model)
    model.to("cuda")
    assert torch.equal(model(x.cuda()), twin.cuda()(x.cuda()))


def test_what_lay_on_the_host_at_the_park_stays_there(gpu: GPU) -> None:
    model = plain()
    model.register_buffer("table", torch.ones(4))
    model.base.to("cpu")
    qmove.park(model)
    model.first(x_of(model))
    qmove.restore(model)
    assert (places(model.base), places(model.first)) == ({"cpu"}, {"cuda"})
    assert model.table.device.type == "cpu"


# What wakes is what is used -----------------------------------------------------------------------


def large() -> nn.Module:
    """64 MiB."""
    return nn.Linear(4096, 4096, bias=False, device="cuda").requires_grad_(False)


def test_a_text_encoder_that_two_pipelines_share_wakes_alone(gpu: GPU) -> None:
    empty = gpu.allocated()
    encoder = nn.Linear(64, 64).cuda().requires_grad_(False)
    pipes = [{"encoder": encoder, "denoiser": large()} for _ in range(2)]
    x = torch.ones(2, 64, device="cuda")
    expected, small = encoder(x), encoder.weight.nbytes + encoder.bias.nbytes
    for pipe in pipes:
        qmove.park(pipe)
    del pipe

    assert torch.equal(encoder(x), expected)

    assert gpu.allocated() == empty + small + x.nbytes + expected.nbytes
    assert [places(pipe["denoiser"]) for pipe in pipes] == [{"cpu"}] * 2
    pipes[1]["denoiser"](torch.ones(1, 4096, device="cuda"))
    assert [places(pipe["denoiser"]) for pipe in pipes] == [{"cpu"}, {"cuda"}]


def test_a_shared_part_wakes_where_there_is_room_for_it_alone(gpu: GPU) -> None:
    import simcuda

    encoder, denoiser = nn.Linear(64, 64).cuda().requires_grad_(False), large()
    x = torch.ones(2, 64, device="cuda")
    expected = encoder(x)
    qmove.park({"encoder": encoder, "denoiser": denoiser})
    simcuda.set_memory(torch.cuda.memory_allocated() + (1 << 20))
    assert torch.equal(encoder(x), expected)
    with pytest.raises(qmove.NotEnoughMemory):
        denoiser(torch.ones(1, 4096, device="cuda"))
    simcuda.set_memory("4GiB")


@pytest.mark.parametrize("extra", [True, False])
def test_loose_tensors_of_a_pipeline_come_home_by_themselves(gpu: GPU, extra: bool) -> None:
    model, latents = plain(), torch.ones(3, 16, device="cuda")
    expected = model(latents)
    pipe: dict[str, Any] = {"model": model, "other": plain()}
    if extra:
        qmove.park(pipe, extra=[{"latents": latents}])
    else:
        qmove.park(pipe | {"latents": latents})
    assert torch.equal(model(latents), expected)
    assert places(pipe["other"]) == {"cpu"}
