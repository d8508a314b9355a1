"""Guarantee 6, Quiet: a resident model carries no trace of qmove."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.quantized_layers import quantized
from tests.builders.snapshots import traces


def test_after_a_restore_nothing_of_qmove_stays_on_the_model(gpu: GPU) -> None:
    model = layers()
    before = traces(model)

    qmove.park(model)
    assert traces(model) != before
    qmove.restore(model)

    assert traces(model) == before


def test_after_waking_nothing_of_qmove_stays_on_the_model(gpu: GPU) -> None:
    model = layers()
    before = traces(model)
    qmove.park(model)

    model(torch.ones(1, 64, device="cuda"))

    assert traces(model) == before


def test_after_moves_nothing_of_qmove_stays_on_the_model(gpu: GPU) -> None:
    model = layers()
    before = traces(model)

    qmove.move(model, "cpu")
    assert traces(model) == before
    qmove.move(model, "cuda:0")

    assert traces(model) == before


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _operators(call: Callable[[], Any]) -> list[str]:
    with _Operators() as operators, torch.inference_mode():
        call()
    return operators.names


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 64, batch_first=True)
    return nn.TransformerEncoder(layer, 2).cuda().eval().requires_grad_(False)


def _attention() -> nn.Module:
    return nn.MultiheadAttention(128, 4, batch_first=True).cuda().eval().requires_grad_(False)


FAST: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "encoder": (_encoder, "_transformer_encoder_layer_fwd"),
    "attention": (_attention, "_native_multi_head_attention"),
    "plain": (lambda: layers(3, width=128), "linear"),
    "int8": (lambda: quantized("int8").float(), "int8"),
    "nf4": (lambda: quantized("nf4 double").float(), "4bit"),
}


@pytest.mark.parametrize("back", ["restored", "streamed", "woken"])
@pytest.mark.parametrize(("build", "fast"), FAST.values(), ids=FAST.keys())
def test_pytorchs_fast_paths_are_taken_again(
    gpu: GPU, build: Callable[[], nn.Module], fast: str, back: str
) -> None:
    """The very operators of before, in their order; not one is added."""
    model, x = build(), torch.ones(2, 3, 128, device="cuda")

    def call() -> Any:
        return model(x, x, x) if isinstance(model, nn.MultiheadAttention) else model(x)

    call()  # bitsandbytes prepares some things in its first forward
    before = _operators(call)
    assert any(fast in name for name in before)
    for _ in range(2):
        qmove.park(model)
        if back == "woken":
            call()
        else:
            qmove.restore(model, stream=back == "streamed")
            streaming.wait_for()
        assert _operators(call) == before


@pytest.mark.parametrize("foreach", [True, None])
def test_optimizers_take_their_fast_path_again(gpu: GPU, foreach: bool | None) -> None:
    def step(model: nn.Module) -> list[str]:
        optimizer = torch.optim.Adam(model.parameters(), foreach=foreach)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        with _Operators() as operators:
            optimizer.step()
        optimizer.zero_grad()
        return operators.names

    twin, model = layers(2), layers(2)
    expected = step(twin)
    qmove.park(model)
    qmove.restore(model)
    assert step(model) == expected
