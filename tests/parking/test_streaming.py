"""Streaming restore: the model is home at once, and each part of it waits for its own bytes when it
is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.parking import layer_order, streaming
from tests.builders.device import GPU
from tests.builders.link import copies_in, copies_queued
from tests.builders.models import (
    image_of,
    inputs,
    layers,
    llama_inputs,
    tiny_diffusion,
    tiny_llama,
    tiny_stable_diffusion,
)
from tests.builders.snapshots import contents, traces
from tests.builders.streaming import Timed, is_arriving, stream_in

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


# As fast as the slower of link and computing -----------------------------------------------------


@pytest.mark.parametrize(
    ("link", "ratio", "keep_mirrors", "reached"),
    [
        ("pcie4", 0.25, True, 1.1),
        ("pcie4", 1.0, True, 1.1),
        ("pcie5", 1.0, False, 1.1),
        ("pcie5", 1.0, True, 1.2),  # queuing the digest of a layer takes 66 us, copying it 380
        ("pcie5", 4.0, True, 1.1),
    ],
)
def test_restore_and_first_forward_take_hardly_longer_than_the_slower_of_copying_and_computing(
    gpu: GPU, link: str, ratio: float, keep_mirrors: bool, reached: float
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    simcuda.link.use(link)
    try:
        rate = simcuda.link.current().h2d_pinned
        model = nn.Sequential(*[Timed(ratio * (20 << 20) / rate) for _ in range(16)])
        qmove.park(model)
        copying, computing = 16 * (20 << 20) / rate, 16 * model[0].seconds
        x = torch.zeros(1, device="cuda")
        simcuda.clock.reset()

        qmove.restore(model, stream=True)
        result = model(x)
        torch.cuda.synchronize()

        assert max(copying, computing) <= simcuda.clock.now() <= reached * max(copying, computing)
        assert result.item() == 16
    finally:
        simcuda.link.use("pcie4")


def test_computing_starts_when_the_first_layer_has_arrived(gpu: GPU) -> None:
    model = nn.Sequential(*[Timed(0.0) for _ in range(8)])
    parked = qmove.park(model)
    x = torch.zeros(1, device="cuda")
    simcuda.clock.reset()
    qmove.restore(model, stream=True)
    model[0](x)
    assert simcuda.clock.now() < 1.3 / 8 * parked.nbytes / simcuda.link.current().h2d_pinned


# Each module waits for its own -------------------------------------------------------------------


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("keep_mirrors", [False, True])
def test_a_layer_waits_for_its_own_bytes_and_no_others(gpu: GPU, keep_mirrors: bool) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    model = layers(4)
    x = inputs()
    expected = [layer(x) for layer in model]
    qmove.park(model)
    stream_in(model)
    left = copies_queued()
    for index, layer in enumerate(model):
        assert type(layer._parameters["weight"]) is not nn.Parameter
        assert torch.equal(layer(x), expected[index])
        assert type(layer.weight) is type(layer.bias) is nn.Parameter
        assert copies_queued() < left
        left = copies_queued()
        assert is_arriving() == (index < 3)
    assert left == 0


@pytest.mark.usefixtures("singly")
def test_a_tensor_that_is_used_by_itself_waits_for_its_own_bytes_and_no_others(gpu: GPU) -> None:
    model = layers(4)
    weights = [layer.weight for layer in model]
    expected = weights[1].sum()
    qmove.park(model)
    stream_in(model)
    assert torch.equal(weights[1].sum(), expected)
    assert type(weights[1]) is nn.Parameter
    assert type(weights[3]) is not nn.Parameter
    assert is_arriving() and copies_queued() > 0


def test_shape_dtype_and_device_are_known_without_waiting(gpu: GPU) -> None:
    model = layers(2)
    weight = model[1].weight
    qmove.park(model)
    stream_in(model)
    left = copies_queued()
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (
        (64, 64),
        torch.float32,
        gpu.device,
        False,
    )
    assert (weight.numel(), weight.stride(), weight.is_contiguous(), len(weight)) == (
        4096,
        (64, 1),
        True,
        64,
    )
    assert (
        weight.is_cuda
        and weight.is_floating_point()
        and weight.element_size() == 4
        and weight.nbytes == 16384
    )
    assert isinstance(weight, nn.Parameter) and isinstance(weight, torch.Tensor)
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
    assert qmove.inventory(model).by_device == {"cuda:0": 2 * (16384 + 256)}
    assert copies_queued() == left


class OutOfOrder(nn.Module):
    """Uses its blocks backwards, and before them what was registered after them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Linear(64, 64 + index, bias=False, device="cuda") for index in range(4)
        )
        self.head = nn.Linear(64, 8, bias=False, device="cuda")
        self.rotary = nn.Linear(64, 4, bias=False, device="cuda")
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, with_rotary: bool = False) -> torch.Tensor:
        total = self.rotary(x).sum() if with_rotary else torch.zeros((), device="cuda")
        for block in reversed(self.blocks):
            total = total + block(x).sum()
        return total + self.head(x).sum()


@pytest.mark.usefixtures("singly")
def test_layers_arrive_in_the_order_in_which_they_were_last_used(gpu: GPU) -> None:
    model, x = OutOfOrder(), inputs()
    expected = model(x)
    *blocks, head, rotary = [weight.nbytes for weight in model.parameters()]
    orders = []
    for _ in range(2):
        qmove.park(model)
        with copies_in() as order:
            stream_in(model)
        orders.append(order)
        assert torch.equal(model(x), expected)
        streaming.wait_for()
    assert orders == [[*blocks, head, rotary], [*blocks[::-1], head, rotary]]
    qmove.park(model)
    with copies_in() as order:
        qmove.restore(model)
    assert order == orders[1], "a restore that waits brings them in the same order"


@pytest.mark.usefixtures("singly")
def test_what_is_needed_first_and_came_last_comes_first_the_next_time(gpu: GPU) -> None:
    """As the table of a rotary embedding does, which a transformer registers after its layers."""
    model, x = OutOfOrder(), inputs()
    expected = model(x, True)
    qmove.park(model)
    stream_in(model)
    assert torch.equal(model(x, True), expected)
    qmove.park(model)
    with copies_in() as order:
        stream_in(model)
    assert order[0] == model.rotary.weight.nbytes
    assert torch.equal(model(x, True), expected)


def test_a_unit_is_a_layer_with_all_below_it_or_a_module_outside_of_all_layers(gpu: GPU) -> None:
    model = nn.Module()
    model.norm = nn.LayerNorm(8)
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    model.table = nn.Parameter(torch.ones(8))
    model.blocks[1][0].bias = model.blocks[0][0].bias
    found = layer_order.groups_of(qmove.inventory(model))
    assert {unit.name: sorted(holding.name for holding in unit.holdings) for unit in found} == {
        "": ["table"],
        "norm": ["norm.bias", "norm.weight"],
        "blocks.0": ["blocks.0.0.bias", "blocks.0.0.weight"],
        "blocks.1": ["blocks.0.0.bias", "blocks.1.0.weight"],
    }
    (second,) = [unit for unit in found if unit.name == "blocks.1"]
    assert second.modules == list(model.blocks[1].modules())


# Waking streams ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_generate_wakes_a_llama_that_computes_while_the_rest_arrives(
    gpu: GPU, precision: str, tmp_path: Any
) -> None:
    model = tiny_llama(precision, tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(llama_inputs(), **options)
    seen: list[bool] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(is_arriving()))
    before, bytes_before = traces(model), contents(model)
    for _ in range(2):
        seen.clear()
        qmove.park(model)
        assert torch.equal(model.generate(llama_inputs(), **options), expected)
        assert seen == [True, False, False, False]
        assert not is_arriving()
        assert traces(model) == before
        assert contents(model) == bytes_before


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize(
    "build", [tiny_diffusion, tiny_stable_diffusion], ids=lambda build: build.__name__
)
def test_a_pipeline_wakes_and_computes_while_the_rest_arrives(
    gpu: GPU, build: Callable[[], Any]
) -> None:
    pipe = build()
    expected = image_of(pipe)
    seen: list[bool] = []
    sd = build is tiny_stable_diffusion
    first = pipe.text_encoder.encoder.layers[0] if sd else pipe.unet.conv_in
    first.register_forward_hook(lambda *_: seen.append(is_arriving()))
    before = traces(pipe.unet)
    for _ in range(2):
        qmove.park(pipe)
        seen.clear()
        assert (image_of(pipe) == expected).all()
        assert seen[0]
        streaming.wait_for()
        assert traces(pipe.unet) == before
        assert not qmove.is_parked(pipe)
