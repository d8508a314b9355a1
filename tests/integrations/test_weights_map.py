"""Offload files and indexes that are damaged: errors that name file and tensor, and a model that is
as it was."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qmove_core as qmove
from qmove_core.errors import OffloadedDataError
from qmove_core.integrations import weights_map
from tests.builders.device import GPU
from tests.builders.dispatched_models import ON_DISK, dispatched, meta_names, tokens

NAME = "blocks.2.linear.weight"


def assert_refused(model: Any, gpu: GPU, *said: str) -> None:
    """Materializing names what is wrong, and changes nothing."""
    missing = meta_names(model)
    objects = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
    allocated = gpu.allocated()
    with pytest.raises(OffloadedDataError) as caught:
        qmove.materialize_meta_tensors(model)
    for words in (NAME, *said):
        assert words in str(caught.value)
    assert "nothing was changed" in str(caught.value)
    assert NAME in [name for name, _reason in caught.value.problems]
    assert meta_names(model) == missing and gpu.allocated() == allocated
    assert {
        name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)
    } == objects
    assert [module.__dict__.get("_hf_hook") for module in model.modules()] == hooks


def test_a_missing_dat_file(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    expected = model(tokens()).cpu()
    file = tmp_path / "offload" / f"{NAME}.dat"
    file.rename(tmp_path / "elsewhere")

    assert_refused(model, gpu, str(file), "is missing")

    (tmp_path / "elsewhere").rename(file)
    assert torch.equal(model(tokens()).cpu(), expected), "the dispatch no longer works"
    qmove.materialize_meta_tensors(model)
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), expected)


def test_a_truncated_dat_file(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    file = tmp_path / "offload" / f"{NAME}.dat"
    file.write_bytes(file.read_bytes()[:-1])
    assert_refused(model, gpu, str(file), "has 4095 bytes", "4096 bytes for [32, 32] of float32")


@pytest.mark.parametrize("cut", [1, 100_000], ids=["by one byte", "in the header"])
def test_a_truncated_safetensors_file(tmp_path: Path, gpu: GPU, cut: int) -> None:
    model = dispatched(tmp_path, ON_DISK, "safetensors")
    file = Path(model.blocks[2].linear._hf_hook.weights_map.dataset.index[NAME]["safetensors_file"])
    content = file.read_bytes()
    file.write_bytes(content[: max(20, len(content) - cut)])
    assert_refused(model, gpu, str(file), "truncated")


def test_a_missing_safetensors_file(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK, "safetensors")
    entry = model.blocks[2].linear._hf_hook.weights_map.dataset.index[NAME]
    Path(entry["safetensors_file"]).unlink()
    assert_refused(model, gpu, entry["safetensors_file"], "is missing")


Entry = dict[str, Any]


@pytest.mark.parametrize(
    ("source", "spoil", "said"),
    [
        pytest.param("dat", lambda index: index.pop(NAME), "no such entry", id="no entry"),
        pytest.param(
            "dat",
            lambda index: index[NAME].update(shape=[16, 64]),
            "shape is [16, 64]",
            id="another shape",
        ),
        pytest.param(
            "dat", lambda index: index[NAME].update(dtype="int32"), "dtype is int32", id="integers"
        ),
        pytest.param(
            "dat",
            lambda index: index[NAME].update(dtype="float17"),
            "'float17'",
            id="no dtype at all",
        ),
        pytest.param(
            "safetensors",
            lambda index: index.pop(NAME),
            "no such entry",
            id="no entry in a safetensors index",
        ),
        pytest.param(
            "safetensors",
            lambda index: index[NAME].update(weight_name="absent"),
            "no tensor 'absent'",
            id="an absent tensor",
        ),
        pytest.param(
            "safetensors",
            lambda index: index[NAME].update(index["blocks.2.norm.weight"]),
            "shape is [32] in",
            id="another tensor's shape",
        ),
    ],
)
def test_a_wrong_index(
    tmp_path: Path, gpu: GPU, source: str, spoil: Callable[[Entry], None], said: str
) -> None:
    model = dispatched(tmp_path, ON_DISK, source)
    spoil(model.blocks[2].linear._hf_hook.weights_map.dataset.index)
    assert_refused(model, gpu, said)


def test_integers_in_a_safetensors_file_where_the_model_has_floats(
    tmp_path: Path, gpu: GPU
) -> None:
    from safetensors.torch import save_file

    model = dispatched(tmp_path, ON_DISK, "safetensors")
    file = tmp_path / "integers.safetensors"
    save_file({"weight": torch.zeros(32, 32, dtype=torch.int32)}, file)
    entry = {"safetensors_file": str(file), "weight_name": "weight"}
    model.blocks[2].linear._hf_hook.weights_map.dataset.index[NAME] = entry
    assert_refused(model, gpu, str(file), "dtype is int32", "float32 in the model")


def test_a_state_dict_without_data(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    model.blocks[2].linear._hf_hook.weights_map.dataset.state_dict[NAME] = torch.empty(
        32, 32, device="meta"
    )
    assert_refused(model, gpu, "no data either")


def test_all_problems_are_named_at_once(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    index = model.blocks[2].linear._hf_hook.weights_map.dataset.index
    del index["blocks.3.norm.bias"]
    (tmp_path / "offload" / f"{NAME}.dat").unlink()
    assert_refused(model, gpu, "blocks.3.norm.bias")


def test_the_index_of_an_older_folder_is_read_as_accelerate_wrote_it(
    tmp_path: Path, gpu: GPU
) -> None:
    """The entries in the index.json and those in memory are the same: nothing else is needed to
    find the data."""
    dispatched(tmp_path, ON_DISK)
    index = json.loads((tmp_path / "offload" / "index.json").read_text())
    again = dispatched(tmp_path, ON_DISK)
    assert again.blocks[2].linear._hf_hook.weights_map.dataset.index == index
    qmove.materialize_meta_tensors(again)
    assert not meta_names(again)


@pytest.mark.parametrize(
    "entry",
    [
        None, [], "x", 7, {}, {"dtype": "float32"}, {"shape": [4]},
        {"dtype": 1, "shape": [4]}, {"dtype": "float32", "shape": None},
        {"dtype": "float32", "shape": ["a"]}, {"dtype": "float32", "shape": [10**30]},
        {"dtype": "float32", "shape": [-4]}, {"dtype": "no such", "shape": [4]},
        {"safetensors_file": 7}, {"safetensors_file": "a\0b"}, {"safetensors_file": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_entry_of_an_offload_index_is_named_as_one(tmp_path: Path, entry: Any) -> None:
    (tmp_path / "w.dat").write_bytes(b"\0" * 16)
    loader = types.SimpleNamespace(state_dict={}, index={"w": entry}, save_folder=str(tmp_path))
    with pytest.raises(weights_map.Unusable):
        weights_map.Sources().find(loader, "w")  # type: ignore[arg-type]
