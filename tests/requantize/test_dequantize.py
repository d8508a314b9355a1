"""Quantized models in full precision: what the values are, and what stays as it was."""

from __future__ import annotations

import weakref
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers, llama_inputs, tiny_llama
from tests.builders.quantized_layers import LAYERS, WIDTH, every_layer, inputs, quantized, values


@every_layer
@pytest.mark.parametrize("device", ["cpu", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("forwards", [0, 1])
def test_a_dequantized_layer_has_exactly_the_quantizations_own_values(
    name: str, device: str, forwards: int
) -> None:
    model = quantized(name)
    layer = model[0]
    for _ in range(forwards):
        model(inputs(model, "cuda"))
    expected = values(layer)

    assert qmove.dequantize_and_move(model, device, torch.float32) is model

    assert model[0] is layer
    assert type(layer) in (nn.Linear, nn.Embedding)
    assert type(layer.weight) is nn.Parameter
    assert not layer.weight.requires_grad
    assert (str(layer.weight.device), layer.weight.dtype) == (device, torch.float32)
    assert torch.equal(layer.weight.cpu(), expected)
    assert qmove.inventory(model).by_device.keys() == {device}
    assert {holding.dtype for holding in qmove.inventory(model).holdings} == {torch.float32}
    assert model(inputs(model, device, torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("name", ["int8", "nf4 double"])
def test_without_a_dtype_the_weights_come_in_the_models_own(name: str) -> None:
    model = quantized(name)
    expected = values(model[0])

    qmove.dequantize_and_move(model, "cpu")

    assert torch.equal(model[0].weight, expected.half())
    assert model(inputs(model, "cpu")).dtype == torch.float16


@every_layer
def test_a_dequantized_layer_keeps_nothing_of_the_quantized_one(gpu: GPU, name: str) -> None:
    before = gpu.allocated()
    model = quantized(name)
    plain = nn.Embedding(2, 2) if isinstance(model[0], nn.Embedding) else nn.Linear(2, 2)
    weight = weakref.ref(model[0].weight)

    qmove.dequantize_and_move(model, "cpu")

    assert gpu.allocated() == before
    assert weight() is None
    assert vars(model[0]).keys() == vars(plain).keys()


@pytest.mark.parametrize("precision", ["int8", "nf4", "fp4"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_transformers_model_runs_in_full_precision_and_quantized_again(
    gpu: GPU, tmp_path: Path, precision: str, dtype: torch.dtype | None
) -> None:
    before = gpu.allocated()
    model = tiny_llama(
        precision, tmp_path, **({} if precision == "int8" else {"bnb_4bit_use_double_quant": False})
    )
    expected, flags = (
        model(llama_inputs()).logits,
        (model.is_quantized, model.hf_quantizer, model.config.to_dict()),
    )
    structure = [(name, type(module)) for name, module in model.named_modules()]
    dtypes = {name: tensor.dtype for name, tensor in model.named_buffers()}
    embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight

    qmove.dequantize_and_move(model, "cpu", dtype)

    assert gpu.allocated() - before == expected.nbytes
    assert not any(type(module).__module__.startswith("bitsandbytes") for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {dtype or torch.float16}
    assert {
        name: tensor.dtype for name, tensor in model.named_buffers()
    } == dtypes  # rotary frequencies stay float32
    torch.testing.assert_close(
        model(llama_inputs("cpu")).logits.half(), expected.cpu(), rtol=5e-2, atol=5e-2
    )

    assert qmove.move_and_requantize(model, "cuda") is model

    assert [(name, type(module)) for name, module in model.named_modules()] == structure
    assert (model.get_input_embeddings().weight, model.lm_head.weight) == (embeddings, head)
    assert embeddings.dtype == torch.float16
    assert (model.is_quantized, model.hf_quantizer, model.config.to_dict()) == flags
    assert torch.equal(model(llama_inputs()).logits, expected)


def test_a_parked_model_is_dequantized_without_coming_home_and_wakes(gpu: GPU) -> None:
    before = gpu.allocated()
    model = quantized("nf4 double")
    expected = values(model[0])
    qmove.park(model)
    gpu.reset_peak()

    qmove.dequantize_and_move(model, "cpu")

    assert gpu.peak() == before
    assert not qmove.is_parked(model)
    assert type(model[0]) is nn.Linear
    assert model(inputs(model, "cpu")).device.type == "cpu"
    assert torch.equal(model[0].weight, expected.half())


def test_layers_and_weights_that_were_shared_are_shared_still(gpu: GPU) -> None:
    model = quantized("nf4 flat")
    model.append(model[0])
    twin = LAYERS["nf4 flat"]()
    twin.weight, twin.bias = model[0].weight, model[0].bias
    model.append(twin)

    qmove.dequantize_and_move(model, "cpu")

    assert model[0] is model[1]
    assert model[2].weight is model[0].weight
    qmove.move_and_requantize(model, "cuda")
    assert model[2].weight is model[0].weight
    assert model[2].quant_state is model[0].quant_state


def test_the_model_fits_together_in_its_new_dtype_and_is_as_before_after_the_way_back() -> None:
    model = nn.Sequential(
        nn.Linear(WIDTH, WIDTH).half().cuda(), *quantized("nf4 flat")
    ).requires_grad_(False)
    model[1].bias.data = model[1].bias.data.float()  # a bias follows its layer
    model.register_buffer("frequencies", torch.ones(4, device="cuda"))  # float32 on purpose: stays
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}

    qmove.dequantize_and_move(model, "cpu")
    assert model(inputs(model, "cpu")).dtype == torch.float16
    qmove.dequantize_and_move(model, "cpu", torch.bfloat16)  # once more, in another one

    assert model(inputs(model, "cpu", torch.bfloat16)).dtype == torch.bfloat16
    assert model.frequencies.dtype == torch.float32
    qmove.move_and_requantize(model, "cuda")
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes


def test_each_component_of_a_pipeline_comes_in_its_own_dtype() -> None:
    components = {
        "text_encoder": quantized("int8"),
        "transformer": quantized("nf4 flat", torch.bfloat16),
    }

    qmove.dequantize_and_move(components, "cpu")

    dtypes = {name: {p.dtype for p in model.parameters()} for name, model in components.items()}
    assert dtypes == {"text_encoder": {torch.float16}, "transformer": {torch.bfloat16}}
    qmove.move_and_requantize(components, "cuda")
    assert components["transformer"][0].weight.quant_state.dtype == torch.bfloat16


def test_hooks_and_other_references_to_a_layer_stay_valid() -> None:
    model = quantized("nf4 flat")
    called = []
    model[0].register_forward_hook(lambda module, args, output: called.append(type(module)))
    bound = model[0].forward
    model[0]._old_forward = bound  # where accelerate's hooks keep the forward that they replace
    model[0].forward = lambda x: model[0]._old_forward(x)

    qmove.dequantize_and_move(model, "cpu")
    model(inputs(model, "cpu"))
    qmove.move_and_requantize(model, "cuda")
    model(inputs(model, "cuda"))

    assert called == [nn.Linear, bnb.nn.LinearNF4]


def test_an_enabled_layer_stays_enabled() -> None:
    layer = qmove.enable_to(quantized("nf4 flat")[0])

    qmove.dequantize_and_move(layer, "cpu")

    assert layer.__class__ is nn.Linear
    assert type(layer).to is not nn.Linear.to
    qmove.disable_to(layer)
    assert type(layer) is nn.Linear


def test_weights_made_under_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = quantized("nf4 flat")
        qmove.dequantize_and_move(model, "cpu")

    assert not model[0].weight.is_inference()
    with torch.enable_grad():
        model[0].weight.requires_grad_().sum().backward()
    assert model[0].weight.grad is not None


def test_what_is_not_quantized_is_just_moved_and_cast() -> None:
    model = layers(2)
    weight = model[0].weight

    qmove.dequantize_and_move(model, "cpu", torch.bfloat16)

    assert model[0].weight is weight
    assert {(tensor.device.type, tensor.dtype) for tensor in model.state_dict().values()} == {
        ("cpu", torch.bfloat16)
    }
