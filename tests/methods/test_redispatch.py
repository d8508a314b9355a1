"""`dispatch_model` for models that materialize, `to()` that does so first, and `redispatch`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import qmove_core as qmove
from qmove_core.errors import NotEnoughMemory, QMoveError
from tests.builders.device import GPU
from tests.builders.dispatched_models import (
    IN_RAM,
    ON_DISK,
    RELOADED_TIES,
    SOURCES,
    SPREAD,
    change_everything,
    dispatched,
    keeping_addresses,
    meta_names,
    objects_of,
    spread_llama,
    tokens,
    tower,
)


@RELOADED_TIES
def test_the_example_of_the_request(tmp_path: Path, gpu: GPU) -> None:
    """A request to accelerate: models take turns on the GPU, one read from the disk, then RAM."""
    model = spread_llama(tmp_path, "disk")
    inputs = torch.arange(3, 19, device=gpu.device).reshape(2, 8)
    expected = model(inputs).logits.cpu()
    with pytest.raises(RuntimeError, match="some modules offloaded"):
        model.to("cpu")

    model = qmove.materialize_meta_tensors(model, target_device="cpu")

    for _ in range(2):
        model.to("cpu")
        assert gpu.allocated() == inputs.nbytes, "the other model would not fit"
        model.to("cuda:0")
        assert torch.equal(model(inputs).logits.cpu(), expected)


def test_a_model_dispatched_with_allow_materialize(tmp_path: Path, gpu: GPU) -> None:
    expected = tower().to(gpu.device)(tokens()).cpu()
    model = qmove.dispatch_model(
        keeping_addresses(tower()),
        device_map=SPREAD,
        allow_materialize=True,
        offload_dir=str(tmp_path),
    )
    assert meta_names(model)
    assert torch.equal(model(tokens()).cpu(), expected)

    assert model.materialize(device="cpu") is model

    assert not meta_names(model)
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), expected)


def test_without_allow_materialize_it_is_accelerates_own(tmp_path: Path, gpu: GPU) -> None:
    model = qmove.dispatch_model(
        tower(), SPREAD, allow_materialize=False, offload_dir=str(tmp_path)
    )
    assert not hasattr(model, "materialize")
    with pytest.raises(RuntimeError, match="some modules offloaded"):
        model.to("cpu")


@pytest.mark.simulated
def test_device_map_auto(tmp_path: Path, gpu: GPU) -> None:
    expected = tower().to(gpu.device)(tokens()).cpu()
    limits = {0: 14_000, 1: 6_000, "cpu": 6_000}
    model = qmove.dispatch_model(
        keeping_addresses(tower()),
        "auto",
        max_memory=limits,
        no_split_module_classes=["Block"],
        offload_dir=str(tmp_path),
    )
    assert {str(place) for place in model.hf_device_map.values()} >= {"0", "disk"}
    assert torch.equal(model(tokens()).cpu(), expected)
    with pytest.raises(QMoveError, match="'balanced'"):
        qmove.dispatch_model(tower(), device_map="somehow")


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize(("device_map", "source"), SOURCES)
@pytest.mark.parametrize("target", ["cpu", "cuda:0"])
def test_to_materializes_first(
    tmp_path: Path,
    gpu: GPU,
    second_gpu: GPU,
    device_map: Any,
    source: str,
    target: str,
    ran_before: bool,
) -> None:
    expected = tower().to(target)(tokens(target)).cpu()
    model = qmove.enable_to(dispatched(tmp_path, device_map, source))
    if ran_before:
        model(tokens())

    assert model.to(target) is model

    assert {str(t.device) for t in [*model.parameters(), *model.buffers()]} == {target}
    assert second_gpu.allocated() == 0
    assert torch.equal(model(tokens(target)).cpu(), expected)
    assert torch.isfinite(model.cpu()(tokens("cpu"))).all()
    assert torch.isfinite(model.cuda()(tokens())).all()


def test_a_move_that_does_not_fit_leaves_the_dispatch(
    tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qmove.enable_to(dispatched(tmp_path, ON_DISK))
    expected = model(tokens()).cpu()
    before = objects_of(model)
    with monkeypatch.context() as patched, pytest.raises(NotEnoughMemory):
        patched.setattr("qmove_core.devices.free_memory", lambda device: 100)
        model.to(gpu.device)
    assert objects_of(model) == before
    assert torch.equal(model(tokens()).cpu(), expected)


def test_materialize_all_brings_everything_to_one_device(
    tmp_path: Path, gpu: GPU, second_gpu: GPU
) -> None:
    model = qmove.enable_to(dispatched(tmp_path, SPREAD))
    assert model.materialize_all(device="cpu") is model
    assert {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]} == {"cpu"}
    assert gpu.allocated() == second_gpu.allocated() == 0
    assert torch.isfinite(model(tokens("cpu"))).all()


def test_the_materialized_context_of_a_model(tmp_path: Path, gpu: GPU) -> None:
    model = qmove.enable_to(dispatched(tmp_path, SPREAD))
    before = objects_of(model)
    with model.materialized():
        assert not meta_names(model)
        model.to("cpu")
    assert objects_of(model) == before


def test_disable_to_leaves_nothing_of_a_dispatch_that_is_gone(tmp_path: Path, gpu: GPU) -> None:
    model = qmove.enable_to(dispatched(tmp_path, SPREAD))
    model.to("cpu")
    qmove.disable_to(model)
    assert not {"to", "cuda", "_qmove_methods_before", "hf_device_map"} & model.__dict__.keys()
    assert not hasattr(model, "materialize")


def files_below(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize("offload_buffers", [False, True], ids=["", "offload_buffers"])
@pytest.mark.parametrize(("device_map", "source"), SOURCES)
def test_the_old_map_again_without_a_new_offload_folder(
    tmp_path: Path, gpu: GPU, second_gpu: GPU, device_map: Any, source: str, offload_buffers: bool
) -> None:
    model = dispatched(tmp_path, device_map, source, offload_buffers=offload_buffers)
    expected = model(tokens()).cpu()
    places = {
        name: t.device
        for name, t in [*model.named_parameters(), *model.named_buffers()]
        if name != "head.weight"
    }
    old_map = dict(model.hf_device_map)
    qmove.materialize_meta_tensors(model).to("cuda:1")
    on_disk = files_below(tmp_path)

    assert qmove.redispatch(model) is model

    assert model.hf_device_map == old_map
    assert files_below(tmp_path) == on_disk, "something was written"
    assert torch.equal(model(tokens()).cpu(), expected)
    after = {
        name: t.device
        for name, t in [*model.named_parameters(), *model.named_buffers()]
        if name != "head.weight"
    }
    assert after == places


@RELOADED_TIES
@pytest.mark.parametrize("source", ["dat", "safetensors"])
def test_weights_that_changed_meanwhile_are_kept(
    tmp_path: Path, gpu: GPU, second_gpu: GPU, source: str
) -> None:
    model = dispatched(tmp_path, SPREAD, source)
    qmove.materialize_meta_tensors(model).to(gpu.device)
    change_everything(model)
    expected = model(tokens()).cpu()
    on_disk = files_below(tmp_path)

    qmove.redispatch(model)

    assert files_below(tmp_path) == on_disk
    assert torch.equal(model(tokens()).cpu(), expected)


def test_only_what_changed_stays_in_ram(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    qmove.materialize_meta_tensors(model)
    with torch.no_grad():
        model.blocks[2].norm.bias += 1
    qmove.redispatch(model)
    assert list(model.blocks[2].norm._hf_hook.weights_map.dataset.state_dict) == [
        "blocks.2.norm.bias"
    ]


def test_a_smaller_map_needs_no_folder_either(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    expected = model(tokens()).cpu()
    qmove.redispatch(model, {**ON_DISK, "blocks.1": "cpu", "blocks.2": "cuda:0"})
    assert not model.blocks[2].linear.weight.is_meta
    assert torch.equal(model(tokens()).cpu(), expected)


def test_a_larger_one_does_and_says_so(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path / "old", ON_DISK)
    expected = model(tokens()).cpu()
    qmove.materialize_meta_tensors(model)
    larger = {**ON_DISK, "blocks.0": "disk", "blocks.1": "cuda:0"}
    with pytest.raises(QMoveError, match=r"blocks\.0.*offload_dir"):
        qmove.redispatch(model, larger)
    assert not meta_names(model)
    qmove.redispatch(model, larger, offload_dir=str(tmp_path / "new"))
    assert torch.equal(model(tokens()).cpu(), expected)


def test_a_parked_model_is_dispatched_again(tmp_path: Path, gpu: GPU, second_gpu: GPU) -> None:
    model = dispatched(tmp_path, SPREAD)
    expected = model(tokens()).cpu()
    qmove.materialize_meta_tensors(model).to(gpu.device)
    qmove.park(model)
    qmove.redispatch(model)
    assert not qmove.is_parked(model)
    assert torch.equal(model(tokens()).cpu(), expected)


def test_a_model_without_a_past(gpu: GPU) -> None:
    with pytest.raises(QMoveError, match=r"device_map=\.\.\."):
        qmove.redispatch(tower())
    model = accelerate.cpu_offload(tower(), execution_device=gpu.device)
    with pytest.raises(QMoveError, match=r"device_map=\.\.\."):
        qmove.redispatch(model)


def test_materializing_keeps_nothing_of_the_dispatch_alive(tmp_path: Path, gpu: GPU) -> None:
    """Moved to a GPU, the model must not leave a second copy in RAM."""
    import gc
    import weakref

    model = dispatched(tmp_path, IN_RAM)
    hook = weakref.ref(model.blocks[1].linear._hf_hook)
    qmove.materialize_meta_tensors(model)
    gc.collect()
    assert hook() is None


@RELOADED_TIES
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_transformers_dispatched(tmp_path: Path, gpu: GPU, place: str) -> None:
    model = spread_llama(tmp_path, place)
    inputs = torch.arange(3, 19, device=gpu.device).reshape(2, 8)
    expected = model(inputs).logits.cpu()
    qmove.materialize_meta_tensors(model).to(gpu.device)
    on_disk = files_below(tmp_path)
    qmove.redispatch(model)
    assert files_below(tmp_path) == on_disk
    assert model.model.layers[1].mlp.up_proj.weight.is_meta
    assert torch.equal(model(inputs).logits.cpu(), expected)
