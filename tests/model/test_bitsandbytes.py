"""bitsandbytes layers and models: parked, restored, run on the CPU and brought back, every byte the
same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import (
    _convert_weight_packed_for_cpu,
    dequantize_4bit,
    name2qmap,
    quantize_4bit,
)
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import llama_inputs, tiny_llama
from tests.builders.places import place_of
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.usefixtures("avx512_bf16")

WIDTH = 64
Layer = Callable[[], nn.Module]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """No graphs; and bitsandbytes' own tables exist already, so that no test counts them as its
    model's bytes."""
    for quant_type in ("nf4", "fp4"):
        packed, state = quantize_4bit(
            torch.ones(64, 64, device="cuda"), quant_type=quant_type, compress_statistics=True
        )
        dequantize_4bit(packed, state)
    with torch.no_grad():
        yield


def linear_8bit(threshold: float) -> Layer:
    return lambda: bnb.nn.Linear8bitLt(WIDTH, 32, has_fp16_weights=False, threshold=threshold)


def linear_4bit(quant_type: str, double: bool, storage: torch.dtype = torch.uint8) -> Layer:
    options = {
        "compress_statistics": double,
        "quant_storage": storage,
        "compute_dtype": torch.float16,
    }
    return lambda: bnb.nn.Linear4bit(WIDTH, 32, quant_type=quant_type, **options)


LINEAR: dict[str, Layer] = {
    "int8": linear_8bit(0.0),
    "int8 with outliers": linear_8bit(2.0),
    "nf4 flat in uint8": linear_4bit("nf4", double=False),
    "nf4 double in uint8": linear_4bit("nf4", double=True),
    "nf4 double in float16": linear_4bit("nf4", double=True, storage=torch.float16),
    "nf4 double in bfloat16": linear_4bit("nf4", double=True, storage=torch.bfloat16),
    "fp4 flat in float32": linear_4bit("fp4", double=False, storage=torch.float32),
    "fp4 flat in uint8": linear_4bit("fp4", double=False),
    "fp4 double in float32": linear_4bit("fp4", double=True, storage=torch.float32),
}
EMBEDDINGS: dict[str, Layer] = {
    "embedding int8": lambda: bnb.nn.Embedding8bit(50, WIDTH),
    "embedding nf4": lambda: bnb.nn.EmbeddingNF4(50, WIDTH),
    "embedding fp4": lambda: bnb.nn.EmbeddingFP4(50, WIDTH),
    "embedding nf4, blocks across rows": lambda: bnb.nn.Embedding4bit(50, 40, quant_type="nf4"),
}
LAYERS = LINEAR | EMBEDDINGS


def quantized(layer: Layer, device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    return layer().half().eval().to(device)


def inputs(module: nn.Module, device: str = "cuda") -> torch.Tensor:
    if isinstance(module, nn.Embedding):
        return torch.arange(12, device=device).reshape(2, 6)
    torch.manual_seed(1)
    x = torch.randn(3, WIDTH)
    x[:, 5] *= 40  # an outlier column for every threshold used here
    return x.half().to(device)


@pytest.mark.parametrize("forwards", [0, 2], ids=["before the first forward", "after a forward"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_parked_layer_leaves_no_byte_and_comes_back_exactly(
    gpu: GPU, name: str, forwards: int
) -> None:
    before = gpu.allocated()
    layer = quantized(LAYERS[name])
    for _ in range(forwards):
        layer(inputs(layer))
    expected = quantized(LAYERS[name])(inputs(layer))
    reference, kept = snapshot(layer), gpu.allocated() - before - expected.nbytes
    assert kept > 0

    parked = qmove.park(layer)

    assert gpu.allocated() - before == expected.nbytes
    assert parked.stragglers == []
    parked.restore()
    assert gpu.allocated() - before == expected.nbytes + kept
    assert snapshot(layer) == reference
    assert torch.equal(layer(inputs(layer)), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_a_moved_layer_runs_on_the_cpu_and_the_way_back_is_exact(name: str) -> None:
    layer = quantized(LAYERS[name])
    expected = layer(inputs(layer))
    reference = {holding: content[1] for holding, content in snapshot(layer).items()}

    qmove.move(layer, "cpu")
    on_cpu = layer(inputs(layer, "cpu"))

    assert on_cpu.device.type == "cpu"
    torch.testing.assert_close(on_cpu, expected.cpu(), rtol=2e-2, atol=2e-2)
    qmove.move(layer, "cuda")
    assert {holding: content[1] for holding, content in snapshot(layer).items()} == reference
    assert torch.equal(layer(inputs(layer)), expected)


@pytest.mark.parametrize("forwards", [0, 1], ids=["before the first forward", "after a forward"])
@pytest.mark.parametrize("way", ["park", "move"])
def test_the_int8_weight_and_its_state_share_one_storage_everywhere(
    way: str, forwards: int
) -> None:
    layer = quantized(LINEAR["int8 with outliers"])
    for _ in range(forwards):
        layer(inputs(layer))
    holder = layer.state if forwards else layer.weight

    for leave, come_back in (
        [(qmove.park, qmove.restore)] if way == "park" else [(_to_cpu, _to_cuda)]
    ):
        leave(layer)
        assert holder.CB.untyped_storage()._cdata == layer.weight.untyped_storage()._cdata
        assert {place_of(holder.CB), place_of(holder.SCB)} == {"cpu"}
        come_back(layer)

    assert holder.CB.untyped_storage()._cdata == layer.weight.untyped_storage()._cdata
    assert {holder.CB.device.type, holder.SCB.device.type} == {"cuda"}


@pytest.mark.parametrize("name", ["nf4 flat in uint8", "fp4 double in float32"])
def test_weight_and_module_share_one_quant_state_everywhere(name: str) -> None:
    layer = quantized(LINEAR[name])
    state = layer.quant_state

    for step in (qmove.park, qmove.restore, _to_cpu, _to_cuda):
        step(layer)
        assert layer.quant_state is state
        assert layer.weight.quant_state is state
        assert state.absmax.device == layer.weight.device


def _to_cpu(model: object) -> None:
    qmove.move(model, "cpu")


def _to_cuda(model: object) -> None:
    qmove.move(model, "cuda")


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_quantized_on_the_cpu_runs_on_the_device(name: str) -> None:
    layer = quantized(LAYERS[name], "cpu")
    expected = quantized(LAYERS[name])(inputs(layer))

    qmove.move(layer, "cuda")

    assert qmove.inventory(layer).by_device.keys() == {"cuda:0"}
    torch.testing.assert_close(layer(inputs(layer)), expected, rtol=2e-2, atol=2e-2)


def test_a_table_of_bitsandbytes_stays_when_one_of_its_users_moves(gpu: GPU) -> None:
    """Releases before 0.46 let all double-quantized weights share one table; so may a user's own
    quant states."""
    kept, moved = quantized(LINEAR["nf4 double in uint8"]), quantized(LINEAR["nf4 double in uint8"])
    expected = moved(inputs(moved))
    if (
        name2qmap["dynamic"].device.type != "cuda"
    ):  # which depends on what ran in this process before
        name2qmap["dynamic"] = name2qmap["dynamic"].cuda()
    for layer in (kept, moved):
        layer.quant_state.state2.code = name2qmap["dynamic"]

    shared = kept.quant_state.state2.code
    qmove.move(moved, "cpu")

    assert shared.device.type == "cuda"
    assert moved.quant_state.state2.code.device.type == "cpu"
    assert torch.equal(kept(inputs(kept)), expected)
    moved(inputs(moved, "cpu"))
    qmove.move(moved, "cuda")
    assert moved.quant_state.state2.code is shared
    assert torch.equal(moved(inputs(moved)), expected)


# Weights that bitsandbytes would repack, or has not quantized -------------------------------------


@pytest.mark.parametrize("flag", [1, True, 0, False], ids=repr)  # the C library answers with an int
def test_a_weight_that_came_from_a_gpu_is_not_packed_on_a_cpu_with_avx512_bf16(
    flag: object,
) -> None:
    layer = quantized(LINEAR["nf4 double in uint8"])
    layer.support_avx512bf16_for_cpu = flag
    expected, reference = layer(inputs(layer)), snapshot(layer)

    qmove.move(layer, "cpu")
    layer(inputs(layer, "cpu"))

    assert not hasattr(layer.quant_state, "packing_format_for_cpu")
    qmove.move(layer, "cuda")
    assert layer.support_avx512bf16_for_cpu is flag
    assert snapshot(layer) == reference
    assert torch.equal(layer(inputs(layer)), expected)


def test_a_way_back_that_fails_leaves_the_layer_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = quantized(LINEAR["nf4 flat in uint8"])
    layer.support_avx512bf16_for_cpu = True
    qmove.move(layer, "cpu")

    def fails(modules: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("qmove_core.parking.sleeping.wake_up", fails)
        qmove.move(layer, "cuda")

    assert layer.weight.device.type == "cpu"
    assert not layer.support_avx512bf16_for_cpu


def test_layers_that_were_on_the_cpu_all_along_may_go_on_packing() -> None:
    model = nn.Sequential(
        quantized(LINEAR["nf4 flat in uint8"]), quantized(LINEAR["nf4 flat in uint8"], "cpu")
    )
    for layer in model:
        layer.support_avx512bf16_for_cpu = True

    with qmove.parked(model):
        assert model[1].support_avx512bf16_for_cpu

    assert [layer.support_avx512bf16_for_cpu for layer in model] == [True, True]


@pytest.mark.parametrize("name", ["nf4 flat in uint8", "fp4 double in float32"])
def test_a_weight_that_was_packed_for_the_cpu_is_refused_with_the_reason(name: str) -> None:
    model = nn.Sequential(quantized(LINEAR[name], "cpu"), nn.Linear(32, 4))
    layer = model[0]
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.quant_state
    )
    before = snapshot(model)

    with pytest.raises(qmove.CannotMove, match=r"0\.weight: .*packed it for AVX512-BF16"):
        qmove.move(model, "cuda")

    assert snapshot(model) == before


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_is_not_quantized_yet_is_refused_and_says_what_to_do(name: str) -> None:
    model = nn.Sequential(LAYERS[name]().half())

    with pytest.raises(
        qmove.CannotMove,
        match=r"0\.weight: .*has not quantized it yet.*call model\.to\(device\) once",
    ):
        qmove.move(model, "cuda")

    assert qmove.inventory(model).by_device.keys() == {"cpu"}
    model.to("cuda")
    qmove.move(model, "cpu")
    qmove.move(model, "cuda")
    assert model(inputs(model[0])).device.type == "cuda"


def test_weights_that_stay_in_half_precision_for_training_move() -> None:
    layer = bnb.nn.Linear8bitLt(WIDTH, 32, has_fp16_weights=True).half()

    qmove.move(layer, "cuda")

    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float16, "cuda")


# Whole models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("forwards", [0, 1], ids=["before the first forward", "after a forward"])
@pytest.mark.parametrize(
    ("precision", "options"),
    [
        ("int8", {}),
        ("int8", {"llm_int8_threshold": 0.0}),
        ("nf4", {}),
        ("nf4", {"bnb_4bit_use_double_quant": False}),
        ("fp4", {"bnb_4bit_quant_storage": torch.float16}),
    ],
    ids=["int8", "int8 without outliers", "nf4 double", "nf4 flat", "fp4 in float16"],
)
def test_a_transformers_model_is_parked_restored_and_run_on_the_cpu(
    gpu: GPU, tmp_path: Path, precision: str, options: dict[str, Any], forwards: int
) -> None:
    before = gpu.allocated()
    model = tiny_llama(precision, tmp_path, **options)
    expected = copy.deepcopy(model)(llama_inputs()).logits
    for _ in range(forwards):
        model(llama_inputs())
    reference = snapshot(model)
    assert gpu.allocated() - before > expected.nbytes

    parked = qmove.park(model)
    assert gpu.allocated() - before == expected.nbytes
    assert parked.stragglers == []
    qmove.restore(model)
    assert snapshot(model) == reference

    assert torch.equal(model(llama_inputs()).logits, expected)
    reference = snapshot(model)
    qmove.move(model, "cpu")
    torch.testing.assert_close(
        model(llama_inputs("cpu")).logits, expected.cpu(), rtol=2e-2, atol=2e-2
    )
    qmove.move(model, "cuda")
    assert {
        name: seen[1] for name, seen in snapshot(model).items() if not name.endswith("state.idx")
    } == {name: seen[1] for name, seen in reference.items() if not name.endswith("state.idx")}
    assert torch.equal(model(llama_inputs()).logits, expected)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_a_diffusers_model_is_parked_restored_and_run_on_the_cpu(
    gpu: GPU, tmp_path: Path, precision: str
) -> None:
    before = gpu.allocated()
    model = _tiny_flux(precision, tmp_path)
    expected = model(**_flux_inputs("cuda")).sample
    reference = snapshot(model)

    parked = qmove.park(model)
    assert gpu.allocated() - before == expected.nbytes
    assert parked.stragglers == []
    assert torch.equal(model(**_flux_inputs("cuda")).sample, expected)  # woken by its use
    assert {
        name: seen for name, seen in snapshot(model).items() if not name.endswith("state.idx")
    } == {name: seen for name, seen in reference.items() if not name.endswith("state.idx")}

    qmove.move(model, "cpu")
    torch.testing.assert_close(
        model(**_flux_inputs("cpu")).sample, expected.cpu(), rtol=2e-2, atol=2e-2
    )
    qmove.move(model, "cuda")
    assert torch.equal(model(**_flux_inputs("cuda")).sample, expected)


def _tiny_flux(precision: str, folder: Path) -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    ).half().save_pretrained(folder)  # fmt: skip
    four_bit = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.float16,
    }
    config = diffusers.BitsAndBytesConfig(
        **({"load_in_8bit": True} if precision == "int8" else four_bit)
    )
    return diffusers.FluxTransformer2DModel.from_pretrained(
        folder, quantization_config=config, torch_dtype=torch.float16, device_map={"": 0}
    ).eval()


def _flux_inputs(device: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    shapes = {
        "hidden_states": (1, 4, 4),
        "encoder_hidden_states": (1, 4, 32),
        "pooled_projections": (1, 32),
    }
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    tensors |= {
        "timestep": torch.ones(1).half(),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(4, 3),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}
