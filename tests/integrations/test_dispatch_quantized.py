"""bitsandbytes models that accelerate dispatched: materialized, parked, and put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import qmove_core as qmove
from qmove_core.errors import ChangesNotKept, MetaTensorsPresent, OffloadedDataError
from tests.builders.device import GPU
from tests.builders.dispatched_models import objects_of
from tests.builders.models import dtype_of_load, llama_inputs, tiny_llama

pytestmark = pytest.mark.usefixtures("avx512_bf16")

FORMATS = [
    pytest.param("nf4", {"bnb_4bit_use_double_quant": False}, id="nf4"),
    pytest.param("nf4", {}, id="nf4 nested"),
    pytest.param("fp4", {}, id="fp4 nested"),
    pytest.param("int8", {}, id="int8"),
]
OFFLOADS = ["cpu", "disk"]


def offloaded(precision: str, folder: Path, place: str, **options: Any) -> Any:
    """A quantized Llama of which accelerate keeps every weight in RAM or on the disk."""
    model = tiny_llama(precision, folder / "llama", **options).requires_grad_(False)
    qmove.move(model, "cpu")  # bitsandbytes' own `to` would leave parts behind
    if place == "cpu":
        return accelerate.cpu_offload(model, execution_device="cuda:0")
    return accelerate.disk_offload(model, str(folder / "offload"), execution_device="cuda:0")


@pytest.mark.parametrize("place", OFFLOADS)
@pytest.mark.parametrize(("precision", "options"), FORMATS)
def test_a_quantized_model_is_rebuilt_from_the_weights_map(
    tmp_path: Path, gpu: GPU, precision: str, options: dict[str, Any], place: str
) -> None:
    inputs = llama_inputs()
    expected = tiny_llama(precision, tmp_path / "llama", **options)(inputs).logits.detach().cpu()
    model = offloaded(precision, tmp_path, place, **options)
    layer = model.model.layers[1].mlp.up_proj
    weight = layer.weight
    assert weight.is_meta

    qmove.materialize_meta_tensors(model)

    assert layer.weight is weight and not qmove.inventory(model).meta
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    if precision != "int8":
        assert layer.quant_state is weight.quant_state
    qmove.move(model, gpu.device)
    assert torch.equal(model(inputs).logits.cpu(), expected)
    qmove.park(model)
    assert torch.equal(model(inputs).logits.cpu(), expected)


@pytest.mark.parametrize("place", OFFLOADS)
@pytest.mark.parametrize(("precision", "options"), FORMATS)
def test_the_same_dispatch_comes_back(
    tmp_path: Path, gpu: GPU, precision: str, options: dict[str, Any], place: str
) -> None:
    inputs = llama_inputs()
    model = offloaded(precision, tmp_path, place, **options)
    before = objects_of(model)
    meta = {item.name: id(item.tensor) for item in qmove.inventory(model).meta}

    with qmove.materialized(model):
        qmove.move(model, gpu.device)
        expected = model(inputs).logits.cpu()

    assert objects_of(model) == before
    assert {item.name: id(item.tensor) for item in qmove.inventory(model).meta} == meta
    if precision == "int8":  # with 4 bits accelerate's own forward fails, before as after
        assert torch.equal(model(inputs).logits.cpu(), expected)
    qmove.materialize_meta_tensors(model)
    assert torch.equal(qmove.move(model, gpu.device) and model(inputs).logits.cpu(), expected)


def test_8_bit_weights_that_accelerate_leaves_resident_are_parked(tmp_path: Path, gpu: GPU) -> None:
    inputs = llama_inputs()
    model = tiny_llama("int8", tmp_path).requires_grad_(False)
    qmove.move(model, "cpu")
    accelerate.cpu_offload(model, execution_device=gpu.device)
    expected = model(inputs).logits.cpu()
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("proj.weight"))
    assert gpu.allocated() > weights, "accelerate has mended this"

    parked = qmove.park(model)

    assert parked.nbytes >= weights and not parked.stragglers
    assert qmove.inventory(model).by_device.keys() == {"cpu"}
    assert torch.equal(model(inputs).logits.cpu(), expected)


def test_materializing_frees_what_8_bit_layers_left_resident(tmp_path: Path, gpu: GPU) -> None:
    inputs = llama_inputs()
    model = offloaded("int8", tmp_path, "cpu")
    expected = model(inputs).logits.cpu()
    resident = gpu.allocated()
    qmove.materialize_meta_tensors(model)
    assert gpu.allocated() < resident / 10
    qmove.move(model, gpu.device)
    assert torch.equal(model(inputs).logits.cpu(), expected)


def test_what_transformers_leaves_unquantized_outside_the_gpu(tmp_path: Path, gpu: GPU) -> None:
    """With `llm_int8_enable_fp32_cpu_offload` the modules on the CPU are no bitsandbytes modules."""
    from transformers import LlamaForCausalLM

    from tests.builders.models import quantization_config

    tiny_llama("fp16", tmp_path)
    places = {
        "model.embed_tokens": 0,
        "model.layers.0": 0,
        "model.layers.1": "cpu",
        "model.norm": 0,
        "model.rotary_emb": 0,
        "lm_head": 0,
    }
    model = LlamaForCausalLM.from_pretrained(
        tmp_path, **dtype_of_load(torch.float16), device_map=places,
        quantization_config=quantization_config("int8", llm_int8_enable_fp32_cpu_offload=True),
    ).requires_grad_(False)  # fmt: skip
    inputs = llama_inputs()
    expected = model(inputs).logits.cpu()
    assert type(model.model.layers[1].mlp.up_proj) is torch.nn.Linear
    qmove.park(model)
    assert qmove.inventory(model).by_device.keys() == {"cpu"}
    assert torch.equal(model(inputs).logits.cpu(), expected)

    qmove.materialize_meta_tensors(model)
    qmove.move(model, gpu.device)

    assert torch.equal(model(inputs).logits.cpu(), expected)


@pytest.mark.parametrize(
    ("precision", "part"), [("int8", "SCB"), ("nf4", "weight.absmax"), ("nf4", "weight.quant_map")]
)
def test_missing_scales_are_named_and_nothing_is_changed(
    tmp_path: Path, gpu: GPU, precision: str, part: str
) -> None:
    model = offloaded(precision, tmp_path, "cpu")
    before = objects_of(model)
    del model.model.layers[1].mlp.up_proj._hf_hook.weights_map.dataset[
        f"model.layers.1.mlp.up_proj.{part}"
    ]
    with pytest.raises(OffloadedDataError, match=rf"up_proj\.weight: .*up_proj\.{part}"):
        qmove.materialize_meta_tensors(model)
    with pytest.raises(MetaTensorsPresent, match=r"up_proj\.weight"):
        qmove.park(qmove_something_on_the_gpu(model))
    assert objects_of(model) == before


def qmove_something_on_the_gpu(model: Any) -> Any:
    model.extra = torch.ones(3, device="cuda:0")
    return model


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_changed_scales_are_refused(tmp_path: Path, gpu: GPU, precision: str) -> None:
    model = offloaded(precision, tmp_path, "cpu")
    with (
        pytest.raises(ChangesNotKept, match=r"up_proj\.weight: the scales of its quantized values"),
        qmove.materialized(model),
    ):
        weight = model.model.layers[1].mlp.up_proj.weight
        (weight.SCB if precision == "int8" else weight.quant_state.absmax).add_(1)


def test_an_error_in_the_commit_takes_everything_off_again(
    tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = offloaded("nf4", tmp_path, "cpu")
    before = objects_of(model)
    meta = {item.name: id(item.tensor) for item in qmove.inventory(model).meta}

    def fail(_inventory: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("qmove_core.model.kinds.refresh", fail)
        qmove.materialize_meta_tensors(model)

    assert objects_of(model) == before
    assert {item.name: id(item.tensor) for item in qmove.inventory(model).meta} == meta
