"""`with materialized(model)`: real inside, and after it the very same dispatch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.errors import ChangesNotKept, NotEnoughMemory
from tests.builders.device import GPU
from tests.builders.dispatched_models import (
    IN_RAM,
    ON_DISK,
    RELOADED_TIES,
    SOURCES,
    SPREAD,
    change_everything,
    dispatched,
    meta_names,
    objects_of,
    spread_llama,
    state,
    tokens,
    tower,
)


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize("offload_buffers", [False, True], ids=["", "offload_buffers"])
@pytest.mark.parametrize(("device_map", "source"), SOURCES)
def test_the_very_same_dispatch_comes_back(
    tmp_path: Path,
    gpu: GPU,
    second_gpu: GPU,
    device_map: Any,
    source: str,
    offload_buffers: bool,
    ran_before: bool,
) -> None:
    model = dispatched(tmp_path, device_map, source, offload_buffers=offload_buffers)
    expected = tower().to(gpu.device)(tokens()).cpu()
    if ran_before:
        model(tokens())
    before = objects_of(model)
    allocated = gpu.allocated(), second_gpu.allocated()

    with qmove.materialized(model) as inside:
        assert inside is model and not meta_names(model)
        model.to(gpu.device)
        assert torch.equal(model(tokens()).cpu(), expected)
        qmove.park(model)
        model.to("cpu")

    assert objects_of(model) == before
    assert (gpu.allocated(), second_gpu.allocated()) == allocated
    assert torch.equal(model(tokens()).cpu(), expected)


def test_also_when_the_body_raises(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, SPREAD)
    before = objects_of(model)
    with pytest.raises(ZeroDivisionError), qmove.materialized(model):
        _ = 1 / 0
    assert objects_of(model) == before


def test_nothing_is_read_from_the_disk_on_the_way_back(tmp_path: Path, gpu: GPU) -> None:
    """The offload folder is not even there meanwhile."""
    model = dispatched(tmp_path / "model", ON_DISK)
    before = objects_of(model)
    with qmove.materialized(model):
        (tmp_path / "model").rename(tmp_path / "away")
        model.to("cpu")
    assert objects_of(model) == before
    shutil.move(tmp_path / "away", tmp_path / "model")
    assert torch.isfinite(model(tokens())).all()


@pytest.mark.parametrize("moved_to", ["cpu", "cuda:0", None])
@pytest.mark.parametrize(("device_map", "source"), SOURCES)
def test_changed_weights_are_kept(
    tmp_path: Path, gpu: GPU, second_gpu: GPU, device_map: Any, source: str, moved_to: str | None
) -> None:
    model = dispatched(tmp_path, device_map, source)
    on_disk = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with qmove.materialized(model):
        if moved_to is not None:
            model.to(moved_to)
        change_everything(model)
        changed = state(model)
    expected = tower().to(gpu.device)
    change_everything(expected)

    assert torch.equal(model(tokens()).cpu(), expected(tokens()).cpu()), (
        "the dispatched model computes with old weights"
    )
    assert {file: file.read_bytes() for file in on_disk} == on_disk, "a file was written"
    qmove.materialize_meta_tensors(model)
    content = state(model)
    assert all(torch.equal(content[name], changed[name]) for name in changed)
    assert model.head.weight is model.embedding.weight


def test_a_change_through_data_is_kept(tmp_path: Path, gpu: GPU) -> None:
    """Such a write does not count as a new version of the tensor."""
    model = dispatched(tmp_path, ON_DISK, "safetensors")
    with qmove.materialized(model):
        weight = model.blocks[2].linear.weight
        version = weight._version
        weight.data[3, 4] += 1
        assert weight._version == version
        changed = weight.detach().clone()
    qmove.materialize_meta_tensors(model)
    assert torch.equal(model.blocks[2].linear.weight, changed)


def test_only_what_changed_takes_ram(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    loader = model.blocks[2].linear._hf_hook.weights_map.dataset
    with qmove.materialized(model), torch.no_grad():
        model.blocks[2].norm.bias += 1
    assert list(loader.state_dict) == ["blocks.2.norm.bias"]


def test_a_replaced_parameter_is_kept(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, IN_RAM)
    before = objects_of(model)
    with qmove.materialized(model):
        model.blocks[1].linear.weight = nn.Parameter(torch.full((32, 32), 3.0), requires_grad=False)
    assert objects_of(model) == before
    qmove.materialize_meta_tensors(model)
    assert bool((model.blocks[1].linear.weight == 3).all())


@pytest.mark.parametrize("source", ["dat", "safetensors"])
def test_a_cast_is_refused_and_the_model_stays_whole(tmp_path: Path, gpu: GPU, source: str) -> None:
    model = dispatched(tmp_path, ON_DISK, source)
    with (
        pytest.raises(
            ChangesNotKept, match=r"blocks\.1\.linear\.weight: it is float16 .* was float32"
        ),
        qmove.materialized(model),
    ):
        model.half()
    assert not meta_names(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert torch.isfinite(model.to("cuda:0")(tokens())).all(), (
        "without its dispatch it does not run"
    )


def test_a_removed_weight_is_refused(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, IN_RAM)
    with (
        pytest.raises(ChangesNotKept, match=r"blocks\.1\.linear\.bias: it was removed"),
        qmove.materialized(model),
    ):
        model.blocks[1].linear.bias = None
    assert model.blocks[1].linear.bias is None


def test_an_untied_weight_is_refused(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, IN_RAM)
    with pytest.raises(ChangesNotKept, match=r"no longer tied"), qmove.materialized(model):
        model.head.weight = nn.Parameter(torch.zeros(64, 32), requires_grad=False)


def test_weights_sent_to_meta_are_refused(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, IN_RAM)
    with pytest.raises(ChangesNotKept, match="its data is gone"), qmove.materialized(model):
        model.blocks[1].linear.to("meta")


def test_changes_that_do_not_fit_into_ram_stay_in_the_model(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    with pytest.raises(NotEnoughMemory), qmove.materialized(model):
        model.to(gpu.device)
        change_everything(model)
        changed = state(model)
        qmove.configure(ram_limit=0)
    qmove.configure(ram_limit=None)
    assert not meta_names(model)
    content = state(model)
    assert all(torch.equal(content[name], changed[name]) for name in changed)


def test_twice_over(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, SPREAD)
    expected = model(tokens()).cpu()
    before = objects_of(model)
    for _ in range(2):
        with qmove.materialized(model), qmove.materialized(model):
            assert not meta_names(model)
        assert objects_of(model) == before
        assert torch.equal(model(tokens()).cpu(), expected)
        before = objects_of(model)


def test_a_model_without_a_dispatch_is_left_alone(gpu: GPU) -> None:
    model = tower().to(gpu.device)
    with qmove.materialized(model):
        model.to("cpu")
    assert model.head.weight.device.type == "cpu"


def test_sequential_hooks_come_back_in_one_piece(gpu: GPU) -> None:
    model = accelerate.cpu_offload(tower(), execution_device=gpu.device)
    accelerate.hooks.add_hook_to_module(
        model.blocks[0].linear, accelerate.hooks.ModelHook(), append=True
    )
    before = objects_of(model)
    with qmove.materialized(model):
        assert type(model.blocks[0].linear._hf_hook) is accelerate.hooks.ModelHook
    assert objects_of(model) == before
    assert len(model.blocks[0].linear._hf_hook.hooks) == 2


@RELOADED_TIES
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_model_that_transformers_dispatched(tmp_path: Path, gpu: GPU, place: str) -> None:
    model = spread_llama(tmp_path, place)
    inputs = torch.arange(3, 19, device=gpu.device).reshape(2, 8)
    expected = model(inputs).logits.cpu()
    before = objects_of(model)
    with qmove.materialized(model):
        model.to(gpu.device)
        assert torch.equal(model(inputs).logits.cpu(), expected)
    assert objects_of(model) == before
    assert torch.equal(model(inputs).logits.cpu(), expected)
