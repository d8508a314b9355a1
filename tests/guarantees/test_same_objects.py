"""What is put back is the very value that was there: the same objects, the same classes, in the
same order.

A round trip takes something away from each of these objects (a flag, a table, a method, a class)
and puts it back. Odd values stand in the places that are taken away: 1 is not True, and None is not
the same as nothing. Hooks that are taken off have a file of their own,
tests/integrations/test_same_hooks.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes as bnb
import numpy
import pytest
import torch
from bitsandbytes.functional import name2qmap
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.same_objects import (
    Objects,
    linear_4bit,
    linear_8bit,
    odd_flags,
    odd_values,
    put,
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# Parking ------------------------------------------------------------------------------------------


@odd_values
def test_a_parked_module_keeps_its_attributes(gpu: GPU, value: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).cuda()
    for name in ("forward", "note", "_hf_hook", "device"):
        put(model[0], name, value)
    objects = Objects(model)
    qmove.park(model)
    qmove.restore(model)
    objects.assert_same()


def test_a_parked_module_is_woken_by_a_forward_that_counts_as_false(gpu: GPU) -> None:
    class Forward(list):  # type: ignore[type-arg]
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = nn.Linear(8, 8).cuda()
    model.__dict__["forward"] = Forward()
    qmove.park(model)
    assert torch.equal(model.forward(torch.ones(2)), torch.full((2,), 2.0))
    assert not qmove.is_parked(model)


# bitsandbytes -------------------------------------------------------------------------------------


def park_and_restore(model: Any) -> None:
    qmove.park(model)
    qmove.restore(model)


def move_and_return(model: Any) -> None:
    qmove.move(model, "cpu")
    qmove.move(model, "cuda")


@pytest.mark.parametrize("round_trip", [park_and_restore, move_and_return])
@odd_flags
def test_the_packing_flag_comes_back_as_it_was(
    gpu: GPU, value: Any, round_trip: Callable[[Any], None]
) -> None:
    layer = linear_4bit()
    put(layer, "support_avx512bf16_for_cpu", value)
    objects = Objects(layer)
    round_trip(layer)
    objects.assert_same()


@odd_flags
def test_a_packing_flag_that_was_changed_at_home_stays_changed(gpu: GPU, value: Any) -> None:
    layer = linear_4bit()
    put(layer, "support_avx512bf16_for_cpu", 1)
    park_and_restore(layer)
    put(layer, "support_avx512bf16_for_cpu", value)
    objects = Objects(layer)
    park_and_restore(layer)
    objects.assert_same()


@pytest.mark.parametrize("value", [1, 0, None, numpy.bool_(True)])
def test_a_packing_flag_that_was_changed_while_away_stays_changed(gpu: GPU, value: Any) -> None:
    layer = linear_4bit()
    put(layer, "support_avx512bf16_for_cpu", True)
    qmove.park(layer)
    layer.support_avx512bf16_for_cpu = value
    qmove.restore(layer)
    assert layer.support_avx512bf16_for_cpu is value


@pytest.mark.parametrize("table_on", ["cpu", "cuda"])
def test_a_shared_table_and_what_stands_in_for_it_come_back(
    gpu: GPU, table_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantization table that all models share never moves: where it is not, a twin stands in for
    it."""
    layer = linear_4bit()
    monkeypatch.setitem(name2qmap, "dynamic", layer.quant_state.state2.code.to(table_on))
    layer.quant_state.state2.code = name2qmap["dynamic"]
    if table_on == "cpu":
        move_and_return(layer)  # from now on a twin stands on the GPU
        assert layer.quant_state.state2.code is not name2qmap["dynamic"]
    objects = Objects(layer)
    for _ in range(2):
        park_and_restore(layer)
        objects.assert_same()
        assert layer.quant_state.state2.code.device.type == "cuda"


# Methods, and layers of another class -------------------------------------------------------------


@odd_values
@pytest.mark.parametrize("name", ["to", "cpu", "half", "materialize"])
def test_methods_that_a_model_had_come_back(gpu: GPU, name: str, value: Any) -> None:
    model = nn.Linear(4, 4)
    put(model, name, value)
    before = dict(model.__dict__)
    qmove.disable_to(qmove.enable_to(model))
    assert type(model) is nn.Linear
    assert model.__dict__.keys() == before.keys()
    assert all(model.__dict__[key] is kept for key, kept in before.items())


def quantize_again(model: Any) -> None:
    qmove.dequantize_and_move(model, "cpu")
    qmove.move_and_requantize(model, "cuda")


@pytest.mark.parametrize(
    "slot", ["compute_type_is_set", "support_avx512bf16_for_cpu", "dtype", "compute_dtype", "note"]
)
@odd_values
def test_a_4_bit_layer_is_quantized_again_with_what_it_had(gpu: GPU, slot: str, value: Any) -> None:
    model = nn.Sequential(linear_4bit())
    put(model[0], slot, value)
    before = list(model[0].__dict__.items())
    quantize_again(model)
    assert type(model[0]) is bnb.nn.Linear4bit
    _assert_as_before(model[0], before, new={"quant_state"})


@pytest.mark.parametrize(
    "slot", ["threshold", "has_fp16_weights", "use_pool", "note", "is_training"]
)
@odd_values
def test_an_8_bit_layer_is_quantized_again_with_what_it_had(
    gpu: GPU, slot: str, value: Any
) -> None:
    model = nn.Sequential(linear_8bit())
    put(model[0].state, slot, value)
    before, state = list(model[0].__dict__.items()), list(model[0].state.__dict__.items())
    quantize_again(model)
    assert type(model[0]) is bnb.nn.Linear8bitLt
    _assert_as_before(model[0], before, new={"state"})
    _assert_as_before(model[0].state, state, new={"CB", "SCB"})


def _assert_as_before(obj: Any, before: list[tuple[str, Any]], new: set[str]) -> None:
    now = obj.__dict__
    assert list(now) == [name for name, _value in before]
    assert not [name for name, value in before if name not in new and now[name] is not value]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_layer_of_quanto_is_quantized_again_as_it_was(gpu: GPU, requires_grad: bool) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(128, 128)).cuda()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    model.requires_grad_(requires_grad)
    before = list(model[0].__dict__.items())
    quantize_again(model)
    _assert_as_before(model[0], before, new=set())
    assert model[0].weight.requires_grad is requires_grad


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
def test_a_layer_that_cannot_change_stays_as_it_was(
    gpu: GPU, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(make())
    model[0].forward = functools.partial(type(model[0]).forward, model[0])
    qmove.enable_to(model[0])
    objects = Objects(model)

    def fails(*arguments: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr("qmove_core.requantize.requantize.move", fails)
        qmove.dequantize_and_move(model, "cpu")
    objects.assert_same()


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
def test_a_forward_of_ones_own_survives_dequantizing(gpu: GPU, make: Any) -> None:
    """accelerate keeps the forward that its hook replaces; only the class's own one changes with
    the class."""
    model = nn.Sequential(make())

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    mine = forward.__get__(model[0])
    model[0].__dict__["forward"] = mine
    quantize_again(model)
    assert model[0].__dict__["forward"] is mine
