"""Quantized models in full precision and back: what the values are, what the round trip costs, and that failures cost nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu, dequantize_4bit, quantize_4bit
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import (
    layers,
    llama_inputs,
    quanto_layers,
    snapshot,
    tiny_llama,
    torchao_layers,
)

WIDTH = 128


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """No graphs; and bitsandbytes' own tables exist already, so that no test counts them as its model's bytes."""
    for quant_type in ("nf4", "fp4"):
        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device="cuda"), quant_type=quant_type))
    with torch.no_grad():
        yield


def linear_8bit(**options: Any) -> Callable[[], nn.Module]:
    return lambda: bnb.nn.Linear8bitLt(WIDTH, 64, has_fp16_weights=False, **options)


def linear_4bit(
    cls: type[nn.Module] = bnb.nn.Linear4bit, **options: Any
) -> Callable[[], nn.Module]:
    return lambda: cls(WIDTH, 64, compute_dtype=torch.float16, **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "int8": linear_8bit(),
    "int8 with outliers": linear_8bit(threshold=6.0),
    "nf4 flat": linear_4bit(bnb.nn.LinearNF4, compress_statistics=False),
    "nf4 double": linear_4bit(bnb.nn.LinearNF4),
    "fp4 flat in bfloat16": linear_4bit(compress_statistics=False, quant_storage=torch.bfloat16),
    "fp4 double": linear_4bit(bnb.nn.LinearFP4, bias=False),
    "embedding int8": lambda: bnb.nn.Embedding8bit(50, WIDTH),
    "embedding nf4": lambda: bnb.nn.EmbeddingNF4(50, WIDTH),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def quantized(name: str, dtype: torch.dtype = torch.float16) -> nn.Sequential:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype).eval().requires_grad_(False)
    layer.weight.data.normal_(0, 0.02)
    return nn.Sequential(layer.cuda())


def inputs(model: nn.Sequential, device: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    torch.manual_seed(1)
    if isinstance(model[0], nn.Embedding):
        return torch.arange(12, device=device).reshape(2, 6)
    return torch.randn(3, WIDTH).to(device, dtype)


def values(layer: nn.Module) -> torch.Tensor:
    """What a layer's codes and scales stand for, in float32 on the CPU, computed here and not by qmove."""
    weight: Any = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.cpu().float() * scales.cpu().float()[:, None] / 127
    state = weight.quant_state
    dtype, state.dtype = state.dtype, torch.float32
    result = dequantize_4bit(weight.data, state).cpu()
    state.dtype = dtype
    return result


# To full precision ----------------------------------------------------------------------------------------------------


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


# And back -------------------------------------------------------------------------------------------------------------


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


# The figures of move_and_requantize's docstring: name, the model's dtype, the dtype in between, and the largest error and the
# error of the norm, in percent of the largest weight and of the norm.
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


# Failures cost nothing ------------------------------------------------------------------------------------------------


def full_model() -> nn.Module:
    """Quantized layers, and plain ones on the device that have to come along."""
    torch.manual_seed(0)
    return nn.Sequential(
        *quantized("int8"), nn.Linear(64, WIDTH).half().cuda(), *quantized("nf4 double")
    ).eval()


def seen(model: nn.Module) -> Any:
    return snapshot(model), [(type(module), dict(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("was_parked", [False, True], ids=["resident", "parked"])
@pytest.mark.parametrize("where", ["layer", "move"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_dequantization_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, was_parked: bool, where: str, error: type[BaseException]
) -> None:
    model = full_model()
    x = torch.ones(2, WIDTH, device="cuda", dtype=torch.float16)
    expected = model(x)
    if was_parked:
        qmove.park(model)
    before = seen(model)

    _fail_at(where, error, monkeypatch, "dequantize")
    with pytest.raises((error, qmove.QMoveError)) as raised:
        qmove.dequantize_and_move(model, "cpu", torch.float32)

    monkeypatch.undo()
    assert raised.value is _raised or raised.value.__cause__ is _raised
    assert seen(model) == before
    assert qmove.is_parked(model) is was_parked
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("where", ["layer", "move"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_requantization_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    model = qmove.dequantize_and_move(full_model(), "cpu", torch.float32)
    before = seen(model)

    _fail_at(where, error, monkeypatch, "quantize")
    with pytest.raises((error, qmove.QMoveError)):
        qmove.move_and_requantize(model, "cuda")

    monkeypatch.undo()
    assert seen(model) == before
    qmove.move_and_requantize(model, "cuda")
    assert type(model[2]) is bnb.nn.LinearNF4


_raised: BaseException | None = None


def _fail_at(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    global _raised
    raised = _raised = error("on purpose")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    if where == "layer":  # the last one: the first has been made already
        from qmove_core.requantize import layer_formats

        monkeypatch.setattr(layer_formats.FourBit, method, fail)
    else:  # the bytes of the plain layers have been copied
        monkeypatch.setattr("qmove_core.model.kinds.refresh", _once(fail))


def _once(fail: Callable[..., None]) -> Callable[..., None]:
    from qmove_core.model import kinds

    refresh, calls = kinds.refresh, []

    def refresh_or_fail(inventory: Any) -> None:
        calls.append(inventory)
        if len(calls) == 1:
            fail()
        refresh(inventory)

    return refresh_or_fail


@pytest.mark.simulated
@pytest.mark.parametrize(
    "room", [0.4, 1.1], ids=["less than the result", "less than result and original"]
)
def test_too_little_room_is_said_before_the_first_byte(gpu: GPU, room: float) -> None:
    import simcuda

    model = full_model()
    result = sum(p.numel() * 4 for p in model.parameters()) + 64 * WIDTH * 4 * 2
    qmove.move(model, "cpu") if room < 1 else None
    gc.collect()
    before, held = seen(model), torch.cuda.memory_allocated()
    simcuda.set_memory(held + int(result * room / 2), device=0)
    gpu.reset_peak()

    with pytest.raises(qmove.NotEnoughMemory, match="Dequantizing Sequential to cuda:0 needs"):
        qmove.dequantize_and_move(model, "cuda", torch.float32)

    assert gpu.peak() == held - gpu.before
    assert seen(model) == before


def test_the_peak_is_the_result_and_one_layer(gpu: GPU) -> None:
    before = gpu.allocated()
    model = nn.Sequential(*[quantized("nf4 double")[0] for _ in range(16)])
    qmove.move(model, "cpu")
    assert gpu.allocated() == before
    gpu.reset_peak()

    qmove.dequantize_and_move(model, "cuda", torch.float32)

    result, layer = gpu.allocated() - before, WIDTH * 64 * 4
    assert result >= 16 * layer
    assert gpu.peak() - before <= result + 4 * layer  # bitsandbytes' own working memory among it


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda layer: _pack(layer), "packed it for AVX512-BF16"),
        (lambda layer: setattr(layer.weight, "SCB", None), r"row scales \(SCB\) are lost"),
        (
            lambda layer: setattr(
                layer, "codes", nn.Parameter(torch.ones(2, dtype=torch.int8), False)
            ),
            "knows no way",
        ),
    ],
    ids=["packed for the CPU", "scales lost", "unknown format"],
)
def test_weights_without_a_way_to_their_values_are_refused(
    spoil: Callable[[Any], None], reason: str
) -> None:
    model = full_model()
    if "packed" in reason:
        qmove.move(model, "cpu")
    spoil(model[2] if "packed" in reason else model[0])
    before = seen(model)

    with pytest.raises(qmove.CannotMove, match=reason):
        qmove.dequantize_and_move(model, "cpu")

    assert seen(model) == before


def _pack(layer: Any) -> None:
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.quant_state
    )


def test_meta_tensors_are_refused() -> None:
    model = full_model()
    model.append(bnb.nn.LinearNF4(64, 64, device="meta"))

    with pytest.raises(qmove.MetaTensorsPresent, match=r"the first is '3\.weight'"):
        qmove.dequantize_and_move(model, "cpu")

    assert type(model[0]) is bnb.nn.Linear8bitLt
