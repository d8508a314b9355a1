"""Parking a model that accelerate dispatched: its GPUs become free, and what lies on the host or
disk is left alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch

import qmove_core as qmove
from qmove_core.errors import MetaTensorsPresent
from tests.builders.device import GPU
from tests.builders.dispatched_models import (
    ON_DISK,
    RELOADED_TIES,
    SOURCES,
    SPREAD,
    dispatched,
    meta_names,
    objects_of,
    spread_llama,
    tokens,
    tower,
)


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a forward"])
@pytest.mark.parametrize(("device_map", "source"), SOURCES)
def test_the_gpus_become_free_and_get_back_what_they_had(
    tmp_path: Path, gpu: GPU, second_gpu: GPU, device_map: Any, source: str, ran_before: bool
) -> None:
    model = dispatched(tmp_path, device_map, source)
    inputs = tokens()
    expected = tower().to(gpu.device)(inputs).cpu()
    if ran_before:
        model(inputs)
    before, missing = objects_of(model), meta_names(model)
    allocated = gpu.allocated(), second_gpu.allocated()
    host = {id(t): t.data_ptr() for t in qmove_host_tensors(model)}

    parked = qmove.park(model)

    assert (gpu.allocated(), second_gpu.allocated()) == (inputs.nbytes, 0)
    assert parked.nbytes == sum(allocated) - inputs.nbytes and not parked.stragglers
    assert meta_names(model) == missing, "what the dispatch keeps elsewhere was loaded"
    assert all(t.data_ptr() == host[id(t)] for t in qmove_host_tensors(model) if id(t) in host)

    qmove.restore(model)

    assert objects_of(model) == before
    assert (gpu.allocated(), second_gpu.allocated()) == allocated
    assert torch.equal(model(inputs).cpu(), expected)


def qmove_host_tensors(model: Any) -> list[torch.Tensor]:
    """The weights that the dispatch keeps in RAM."""
    for module in model.modules():
        weights_map = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if weights_map is not None:
            return list(weights_map.dataset.state_dict.values())
    return []


@pytest.mark.parametrize("offload_buffers", [False, True], ids=["", "offload_buffers"])
@pytest.mark.parametrize("source", ["dat", "safetensors"])
def test_a_parked_dispatch_wakes(
    tmp_path: Path, gpu: GPU, second_gpu: GPU, source: str, offload_buffers: bool
) -> None:
    model = dispatched(tmp_path, SPREAD, source, offload_buffers=offload_buffers)
    expected = model(tokens()).cpu()
    for use in (model, model.forward):
        qmove.park(model)
        assert qmove.is_parked(model)
        assert list(inspect.signature(model.forward).parameters) == ["tokens"]
        assert torch.equal(use(tokens()).cpu(), expected)
        assert not qmove.is_parked(model)


def test_a_part_that_is_called_wakes_the_whole(tmp_path: Path, gpu: GPU, second_gpu: GPU) -> None:
    model = dispatched(tmp_path, SPREAD)
    x = torch.ones(1, 3, 32, device=gpu.device)
    expected = model.blocks[1](x).cpu()
    qmove.park(model)
    assert torch.equal(model.blocks[1].forward(x).cpu(), expected)
    assert not qmove.is_parked(model) and model.embedding.weight.device == gpu.device


def test_parking_reads_nothing_from_the_disk(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path / "model", ON_DISK)
    (tmp_path / "model").rename(tmp_path / "away")
    qmove.park(model)
    qmove.restore(model)
    (tmp_path / "away").rename(tmp_path / "model")
    assert torch.isfinite(model(tokens())).all()


@RELOADED_TIES
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_generate_on_a_parked_dispatch(tmp_path: Path, gpu: GPU, place: str) -> None:
    model = spread_llama(tmp_path, place)
    inputs = torch.arange(3, 11, device=gpu.device).reshape(1, 8)
    expected = model.generate(inputs, max_new_tokens=4, do_sample=False).cpu()
    device = model.device
    qmove.park(model)
    assert model.device == device
    assert gpu.allocated() == inputs.nbytes
    assert torch.equal(model.generate(inputs, max_new_tokens=4, do_sample=False).cpu(), expected)


def test_a_parked_dispatch_is_materialized_where_it_lies(
    tmp_path: Path, gpu: GPU, second_gpu: GPU
) -> None:
    model = dispatched(tmp_path, SPREAD)
    expected = model(tokens()).cpu()
    qmove.park(model)
    qmove.materialize_meta_tensors(model)
    assert gpu.allocated() == 0 and second_gpu.allocated() == 0
    qmove.restore(model)
    assert model.blocks[0].linear.weight.device == gpu.device and not meta_names(model)
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), expected)


def test_parked_around_a_materialized_body(tmp_path: Path, gpu: GPU, second_gpu: GPU) -> None:
    model = dispatched(tmp_path, SPREAD)
    expected = model(tokens()).cpu()
    before = objects_of(model)
    with qmove.parked(model):
        with qmove.materialized(model):
            assert gpu.allocated() == 0
        assert gpu.allocated() == 0, "putting the dispatch back brought the model into VRAM"
    assert objects_of(model) == before
    assert torch.equal(model(tokens()).cpu(), expected)


def test_weights_that_nobody_has_are_refused_and_the_error_says_that_materializing_cannot_help(
    gpu: GPU,
) -> None:
    model = tower().to(gpu.device)
    with accelerate.init_empty_weights():
        model.blocks[1] = tower().blocks[1]
    with pytest.raises(
        MetaTensorsPresent,
        match=r"materialize_meta_tensors reads what a dispatch keeps .* cannot help",
    ):
        qmove.park(model)


def test_a_dispatched_model_does_not_move_and_the_error_says_what_to_call(
    tmp_path: Path, gpu: GPU
) -> None:
    model = dispatched(tmp_path, ON_DISK)
    with pytest.raises(
        MetaTensorsPresent, match=r"a dispatch keeps .* Call qmove\.materialize_meta_tensors"
    ):
        qmove.move(model, "cpu")
