"""A model that accelerate spread over devices, RAM and disk becomes whole:
`materialize_meta_tensors`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.utils.offload import offload_weight
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.dispatched_models import (
    IN_RAM,
    ON_DISK,
    RELOADED_TIES,
    SOURCES,
    dispatched,
    meta_names,
    spread_llama,
    state,
    tokens,
    tower,
)


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("offload_buffers", [False, True], ids=["", "offload_buffers"])
@pytest.mark.parametrize(("device_map", "source"), SOURCES)
def test_a_dispatched_model_becomes_an_ordinary_one(
    tmp_path: Path,
    gpu: GPU,
    second_gpu: GPU,
    device_map: Any,
    source: str,
    offload_buffers: bool,
    ran_before: bool,
) -> None:
    truth = state(tower())
    model = dispatched(tmp_path, device_map, source, offload_buffers=offload_buffers)
    expected = model(tokens()).cpu() if ran_before else tower().to(gpu.device)(tokens()).cpu()
    missing = meta_names(model)
    assert missing
    objects = {name: parameter for name, parameter in model.named_parameters()}
    real = {name: t.device for name, t in model.state_dict().items() if not t.is_meta}
    on_gpu = gpu.allocated(), second_gpu.allocated()
    gpu.reset_peak()

    assert qmove.materialize_meta_tensors(model) is model

    assert not meta_names(model)
    assert not qmove.inventory(model).meta
    assert gpu.peak() == on_gpu[0], "a byte went through VRAM on the way to the CPU"
    assert (gpu.allocated(), second_gpu.allocated()) == on_gpu
    content = state(model)
    assert all(torch.equal(content[name], truth[name]) for name in truth)
    assert {name: t.device for name, t in model.state_dict().items() if name in real} == real, (
        "a real tensor moved"
    )
    for name, parameter in model.named_parameters():
        assert parameter is objects[name], f"{name} is another Parameter object than before"
    assert model.head.weight is model.embedding.weight, "the tie is lost"
    for module in model.modules():
        assert (
            not {"_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map"}
            & module.__dict__.keys()
        )

    model.to("cpu")
    assert torch.isfinite(model(tokens("cpu"))).all()
    model.to(gpu.device)
    assert torch.equal(model(tokens()).cpu(), expected)
    qmove.park(model)
    assert gpu.allocated() == 0
    qmove.restore(model)
    assert torch.equal(model(tokens()).cpu(), expected)


def test_weights_in_ram_are_used_where_they_lie(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, IN_RAM)
    weights = model.blocks[1].linear._hf_hook.weights_map.dataset.state_dict
    before = qmove.stats().arena_bytes

    qmove.materialize_meta_tensors(model)

    for name in ("blocks.1.linear.weight", "blocks.2.norm.bias", "embedding.weight"):
        assert model.get_parameter(name).data_ptr() == weights[name].data_ptr(), (
            f"{name} was copied"
        )
    assert qmove.stats().arena_bytes == before


def test_safetensors_files_are_mapped_and_never_written(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK, "safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    on_disk = [file.read_bytes() for file in files]
    before = qmove.stats().arena_bytes

    qmove.materialize_meta_tensors(model)
    assert qmove.stats().arena_bytes == before, "there is a second copy in RAM"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)

    assert [file.read_bytes() for file in files] == on_disk
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())


def test_a_dat_file_may_be_overwritten_afterwards(tmp_path: Path, gpu: GPU) -> None:
    """accelerate rewrites the files of an offload folder in place when the folder serves another
    model."""
    model = dispatched(tmp_path, ON_DISK)
    truth = state(tower())
    qmove.materialize_meta_tensors(model)

    for file in (tmp_path / "offload").glob("*.dat"):
        file.write_bytes(b"\x55" * 4)

    content = state(model)
    assert all(torch.equal(content[name], truth[name]) for name in truth)


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
     torch.uint8, torch.int16, torch.int64, torch.bool, torch.complex64],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)], ids=str)
def test_every_dtype_and_shape_of_a_dat_file(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if (
        dtype.is_floating_point
        and dtype.itemsize == 1
        and "float8" not in inspect.getsource(offload_weight)
    ):
        pytest.skip("this release of accelerate cannot write float8 to a .dat file")
    content = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8)
    value = (
        (content > 127).view(torch.bool)[..., 0]
        if dtype is torch.bool
        else content.view(dtype)[..., 0]
    )
    model = nn.Module()
    model.weight = nn.Parameter(value.clone(), requires_grad=False)
    accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    assert model.weight.is_meta

    qmove.materialize_meta_tensors(model)

    assert model.weight.dtype is dtype and model.weight.shape == shape
    assert (
        model.weight.reshape(-1)
        .view(torch.uint8)
        .equal(value.clone().reshape(-1).view(torch.uint8))
    )


def test_an_offload_folder_that_holds_another_floating_dtype_gives_what_the_forward_uses(
    tmp_path: Path, gpu: GPU
) -> None:
    """accelerate casts on the way in each forward: float32 files for a float16 model."""
    index = accelerate.utils.offload.offload_state_dict(tmp_path, tower().state_dict())
    assert index is None
    model = tower(dtype=torch.float16)
    accelerate.disk_offload(model, str(tmp_path), execution_device=gpu.device)
    expected = model(tokens()).cpu()

    qmove.materialize_meta_tensors(model)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), expected)


def test_cpu_offload_keeps_its_weights_in_a_plain_dict(gpu: GPU) -> None:
    truth = tower().to(gpu.device)(tokens()).cpu()
    model = accelerate.cpu_offload(tower(), execution_device=gpu.device)
    assert len(meta_names(model)) == len(list(model.named_parameters(remove_duplicate=False)))

    qmove.materialize_meta_tensors(model)

    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), truth)


def test_a_hook_that_looks_after_its_submodules(gpu: GPU) -> None:
    """`preload_module_classes` gives a Block one hook for all that is in it (`place_submodules`)."""
    truth = tower().to(gpu.device)(tokens()).cpu()
    model = accelerate.cpu_offload(
        tower(), execution_device=gpu.device, preload_module_classes=["Block"]
    )
    assert model.blocks[0]._hf_hook.place_submodules and not hasattr(
        model.blocks[0].linear, "_hf_hook"
    )

    qmove.materialize_meta_tensors(model)

    assert not meta_names(model)
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), truth)


def test_other_hooks_in_a_sequence_stay(gpu: GPU) -> None:
    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output * 2

    model = accelerate.cpu_offload(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), execution_device=gpu.device
    )
    doubling = Doubling()
    accelerate.hooks.add_hook_to_module(model[0], doubling, append=True)
    inputs = torch.ones(1, 4, device=gpu.device)
    expected = model(inputs)

    qmove.materialize_meta_tensors(model)

    assert model[0]._hf_hook is doubling
    assert torch.equal(model.to(gpu.device)(inputs), expected)


def test_a_forward_that_somebody_replaced_before_the_dispatch_comes_back(gpu: GPU) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    own = model[0].forward
    model[0].forward = replaced = lambda x: own(x) + 1
    accelerate.cpu_offload(model, execution_device=gpu.device)

    qmove.materialize_meta_tensors(model)

    assert model[0].forward is replaced


def test_to_a_gpu(tmp_path: Path, gpu: GPU) -> None:
    truth = tower().to(gpu.device)(tokens()).cpu()
    model = dispatched(tmp_path, ON_DISK, "safetensors")

    qmove.materialize_meta_tensors(model, target_device="cuda")

    assert {parameter.device for parameter in model.parameters()} == {gpu.device}
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), truth)


def test_to_a_device_map(tmp_path: Path, gpu: GPU, second_gpu: GPU) -> None:
    model = dispatched(tmp_path, IN_RAM)

    qmove.materialize_meta_tensors(model, {"": "cpu", "blocks.1": "cuda:1", "blocks.1.norm": 0})

    assert model.blocks[1].linear.weight.device == second_gpu.device
    assert model.blocks[1].norm.weight.device == gpu.device
    assert model.blocks[2].linear.weight.device.type == "cpu"


def test_inference_tensors_stay_what_they_are(tmp_path: Path, gpu: GPU) -> None:
    """ComfyUI runs nodes, and so loads models, under `torch.inference_mode`."""
    with torch.inference_mode():
        model = accelerate.cpu_offload(tower(), execution_device=gpu.device)
        parameter = model.blocks[0].linear.weight
        assert parameter.is_meta and parameter.is_inference()
    qmove.materialize_meta_tensors(model)
    assert model.blocks[0].linear.weight is parameter
    assert parameter.is_inference() and not parameter.is_meta
    with torch.inference_mode():
        assert torch.isfinite(model.to("cpu")(tokens("cpu"))).all()


def test_requires_grad_is_kept_and_gradients_arrive(gpu: GPU) -> None:
    model = accelerate.cpu_offload(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), execution_device=gpu.device
    )
    model[0].weight.requires_grad_(False)
    qmove.materialize_meta_tensors(model)
    model(torch.ones(1, 4)).sum().backward()
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None and model[1].weight.grad.shape == (4, 4)


def test_a_whole_model_is_left_alone(gpu: GPU) -> None:
    model = tower().to(gpu.device)
    before = state(model)
    assert qmove.materialize_meta_tensors(qmove.materialize_meta_tensors(model)) is model
    assert all(torch.equal(before[name], tensor) for name, tensor in state(model).items())


@RELOADED_TIES
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a forward"])
def test_a_model_that_transformers_dispatched(
    tmp_path: Path, gpu: GPU, place: str, ran_before: bool
) -> None:
    model = spread_llama(tmp_path, place)
    inputs = torch.arange(3, 19, device=gpu.device).reshape(2, 8)
    reference = spread_llama(tmp_path, place)(inputs).logits.cpu()
    if ran_before:
        model(inputs)
    allocated = gpu.allocated()
    gpu.reset_peak()

    qmove.materialize_meta_tensors(model)

    assert gpu.peak() == allocated
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.to(gpu.device)
    assert torch.equal(model(inputs).logits.cpu(), reference)
    assert torch.equal(model.generate(inputs, max_new_tokens=3, do_sample=False)[:, :8], inputs)
    model.save_pretrained(tmp_path / "again")
