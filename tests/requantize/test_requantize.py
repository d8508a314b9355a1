"""Dequantized models quantized again: what they are, and how large the error of the round trip is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.models import layers, quanto_layers, torchao_layers
from tests.builders.quantized_layers import every_layer, inputs, quantized, values
from tests.builders.snapshots import snapshot


@every_layer
def test_a_requantized_layer_has_the_class_and_the_options_it_had(name: str) -> None:
    model = quantized(name)
    model(inputs(model, "cuda"))
    before, after = model[0], quantized(name)[0]
    expected, options = model(inputs(model, "cuda")), _options(before)
    assert options["cls"] is type(after)

    qmove.dequantize_and_move(model, "cpu")
    qmove.move_and_requantize(model, "cuda")

    assert _options(model[0]) == options
    assert vars(model[0]).keys() == vars(after).keys()
    assert qmove.inventory(model).by_device.keys() == {"cuda:0"}
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if "double" in name else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(model(inputs(model, "cuda")), expected, **tolerance)
    reference = snapshot(model)
    qmove.park(model).restore()
    assert snapshot(model) == reference


@every_layer
def test_what_was_set_on_a_weight_is_on_it_after_each_way(name: str) -> None:
    model = quantized(name)
    model(inputs(model, "cuda"))
    model[0].weight.tag, model[0].weight.note = "mine", {"step": 3}
    before = vars(model[0].weight).keys()

    qmove.dequantize_and_move(model, "cpu")
    plain: Any = model[0].weight
    assert vars(plain) == {"tag": "mine", "note": {"step": 3}}
    plain.later = 7
    qmove.move_and_requantize(model, "cuda")

    weight: Any = model[0].weight
    assert (weight.tag, weight.note, weight.later) == ("mine", {"step": 3}, 7)
    assert vars(weight).keys() - before <= {"later", "CB", "SCB"}


@pytest.mark.parametrize("kind", ["qint8", "qint4", "torchao int8"])
def test_what_was_set_on_a_wrapper_subclass_is_on_its_plain_weight_alone(kind: str) -> None:
    model = torchao_layers("int8") if "torchao" in kind else quanto_layers(kind)
    weight: Any = model[0].weight
    weight.tag = "mine"
    qmove.dequantize_and_move(model, "cpu")
    assert vars(model[0].weight) == {"tag": "mine"}


def _options(layer: Any) -> dict[str, Any]:
    of_weight = (
        "blocksize",
        "compress_statistics",
        "quant_type",
        "quant_storage",
        "bnb_quantized",
        "has_fp16_weights",
    )
    options = {name: getattr(layer.weight, name, None) for name in of_weight}
    options |= {
        name: value
        for name, value in vars(layer).items()
        if name in ("compute_dtype", "index", "dtype")
    }
    state, quant_state = getattr(layer, "state", None), getattr(layer.weight, "quant_state", None)
    options |= {
        name: getattr(state, name, None) for name in ("threshold", "has_fp16_weights", "use_pool")
    }
    options |= {
        name: getattr(quant_state, name, None)
        for name in ("dtype", "shape", "nested", "quant_type")
    }
    return options | {"cls": type(layer), "shape": layer.weight.shape, "weight": type(layer.weight)}


# The figures of move_and_requantize's docstring: name, the model's dtype, the dtype in between, and
# the largest error and the error of the norm, in percent of the largest weight and of the norm.
ROUND_TRIPS = [
    *[(name, own, between, 0, 0) for name in ("int8", "nf4 flat", "fp4 flat in bfloat16") for own, between in (
        (torch.float16, torch.float16), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16),
    )],
    *[(name, torch.float16, between, 0.2, 0.03) for name in ("nf4 double", "fp4 double") for between in (
        torch.float16, torch.float32,
    )],
    *[(name, torch.bfloat16, torch.bfloat16, 0.5, 0.07) for name in ("nf4 double", "fp4 double")],
    *[(name, torch.float16, torch.bfloat16, 0.6, 0.2) for name in ("int8", "nf4 flat", "nf4 double")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "own", "between", "largest", "norm"), ROUND_TRIPS)
def test_the_error_of_a_round_trip_is_what_the_docstring_says(
    name: str, own: torch.dtype, between: torch.dtype, largest: float, norm: float
) -> None:
    model = quantized(name, own)
    before = values(model[0])

    qmove.dequantize_and_move(model, "cpu", between)
    qmove.move_and_requantize(model, "cuda")

    error = values(model[0]) - before
    assert error.abs().max() * 100 <= largest * before.abs().max()
    assert error.norm() * 100 <= norm * before.norm()
    assert (error.abs().max() > 0) == (largest > 0)


def test_changes_made_in_full_precision_are_kept() -> None:
    model = quantized("int8")
    qmove.dequantize_and_move(model, "cpu", torch.float32)

    model[0].weight.data *= 2
    expected = model[0].weight.clone()
    qmove.move_and_requantize(model, "cuda")

    torch.testing.assert_close(
        values(model[0]), expected, rtol=0, atol=float(expected.abs().max()) / 127
    )


def test_a_quantized_model_is_just_moved() -> None:
    model = quantized("nf4 flat")
    weight = model[0].weight

    qmove.move_and_requantize(model, "cuda:1")

    assert model[0].weight is weight
    assert str(weight.device) == "cuda:1"


def test_a_model_that_qmove_has_not_dequantized_is_refused() -> None:
    model = layers(2, device="cpu")

    with pytest.raises(qmove.CannotMove, match="has dequantized none of its layers"):
        qmove.move_and_requantize(model, "cuda")

    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_quanto_layers_go_both_ways(kind: str) -> None:
    model = quanto_layers(kind)
    classes = [type(layer) for layer in model]
    x = torch.randn(2, model[0].in_features, device="cuda", dtype=model[0].weight.dtype)
    expected, weight = model(x), model[0].weight.dequantize()

    qmove.dequantize_and_move(model, "cpu")

    assert torch.equal(model[0].weight, weight.cpu())
    plain = nn.functional.linear(x.cpu(), model[0].weight, model[0].bias)
    assert torch.equal(model[0](x.cpu()), plain)
    qmove.move_and_requantize(model, "cuda")
    assert [type(layer) for layer in model] == classes
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


def test_torchao_layers_are_dequantized_and_the_way_back_is_refused() -> None:
    model = torchao_layers("int8")
    weight = model[0].weight.dequantize()

    qmove.dequantize_and_move(model, "cpu")

    assert torch.equal(model[0].weight, weight.cpu())
    before = snapshot(model)
    with pytest.raises(qmove.CannotMove, match=r"0: its library does not keep the config"):
        qmove.move_and_requantize(model, "cuda")
    assert snapshot(model) == before
