"""File-backed mirrors: which tensors of a model are found in which files, and what is refused."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest
from safetensors.torch import save_file

import qmove_core as qmove
from qmove_core.memory import arena, mirrors
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.file_mirrors import is_mapped, mirrored, saved
from tests.builders.mirrors import BIAS, MODEL, WEIGHT, WIDTH
from tests.builders.models import layers
from tests.builders.snapshots import contents, snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("no_files_mapped")]


# What matches ------------------------------------------------------------------------------------


def test_names_in_the_file_may_have_a_prefix(gpu: GPU, tmp_path: Path) -> None:
    model = layers(4, width=WIDTH)
    path = saved(model, tmp_path, "model.diffusion_model.")
    assert qmove.mirror_files(model, path) == 0
    assert qmove.mirror_files(model, str(path), prefix="model.diffusion_model.") == MODEL
    assert qmove.park(model).copied_bytes == 0


def test_tied_weights_are_mirrored_once_whichever_name_is_saved(gpu: GPU, tmp_path: Path) -> None:
    model = layers(2, width=WIDTH)
    model[1].weight = model[0].weight
    path = tmp_path / "tied.safetensors"
    save_file(
        {name: model.get_parameter(name).cpu() for name in ("0.bias", "1.weight", "1.bias")}, path
    )
    before = snapshot(model)
    assert qmove.mirror_files(model, path) == WEIGHT + 2 * BIAS
    assert qmove.park(model).copied_bytes == 0
    assert model[0].weight is model[1].weight
    qmove.restore(model)
    assert snapshot(model) == before


def test_several_files_and_what_they_lack(gpu: GPU, tmp_path: Path) -> None:
    model = layers(4, width=WIDTH)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    save_file({name: state[name] for name in ("0.weight", "0.bias")}, tmp_path / "a.safetensors")
    save_file(
        {"1.weight": state["1.weight"], "2.weight": state["2.weight"].half()},
        tmp_path / "b.safetensors",
    )
    assert (
        qmove.mirror_files(model, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
        == 2 * WEIGHT + BIAS
    )
    before = contents(model)
    assert qmove.park(model).copied_bytes == MODEL - (2 * WEIGHT + BIAS)
    assert contents(model) == before
    qmove.restore(model)
    assert contents(model) == before and qmove.park(model).copied_bytes == 0


def test_other_bytes_of_the_same_name_and_size_do_not_match(
    gpu: GPU, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qmove")
    model = layers(4, width=WIDTH)
    path = saved(model, tmp_path)
    for parameter in model.parameters():
        parameter.data[..., 0] += 1
    assert qmove.mirror_files(model, path) == 0
    assert "no tensor there has such a name, size and content" in caplog.text
    assert not is_mapped(path)


def test_parked_models_and_models_on_the_cpu_have_nothing_to_mirror(
    gpu: GPU, tmp_path: Path
) -> None:
    model = layers(4, width=WIDTH)
    path = saved(model, tmp_path)
    qmove.park(model)
    assert qmove.mirror_files(model, path) == qmove.mirror_files(layers(1, device="cpu"), path) == 0


def test_a_model_that_is_still_arriving_is_waited_for(gpu: GPU, tmp_path: Path) -> None:
    model = layers(4, width=WIDTH)
    path = saved(model, tmp_path)
    qmove.park(model)
    qmove.restore(model, stream=True)
    assert qmove.mirror_files(model, path) == MODEL
    streaming.wait_for()
    assert arena.bytes_in_use() == 0, "the copy in RAM came after that of the file"


def test_a_mirror_in_ram_makes_way(gpu: GPU, tmp_path: Path) -> None:
    model = layers(4, width=WIDTH)
    qmove.park(model)
    qmove.restore(model)
    assert mirrors.nbytes() == MODEL
    assert qmove.mirror_files(model, saved(model, tmp_path)) == MODEL
    assert mirrors.nbytes() == arena.bytes_in_use() == 0


def test_the_rest_of_a_mirror_in_ram_keeps_no_block(gpu: GPU, tmp_path: Path) -> None:
    model = layers(4, width=WIDTH)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items() if name != "3.bias"}
    save_file(state, tmp_path / "most.safetensors")
    qmove.park(model)
    qmove.restore(model)
    assert qmove.mirror_files(model, tmp_path / "most.safetensors") == MODEL - BIAS
    assert arena.bytes_in_use() == 0
    assert (qmove.park(model).copied_bytes, arena.bytes_in_use()) == (BIAS, BIAS)


def test_unaligned_weights_are_parked_as_always(gpu: GPU, tmp_path: Path) -> None:
    model, path = layers(4, width=WIDTH), tmp_path / "odd.safetensors"
    whole = saved(model, tmp_path).read_bytes()
    header = int.from_bytes(whole[:8], "little")
    path.write_bytes(
        (header + 2).to_bytes(8, "little") + whole[8 : 8 + header] + b"  " + whole[8 + header :]
    )
    assert qmove.mirror_files(model, path) == 0


def test_a_model_that_is_gone_leaves_no_map(gpu: GPU, tmp_path: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    resident, path = mirrored(tmp_path)
    assert is_mapped(path) and len(os.listdir("/proc/self/fd")) > descriptors
    del resident
    gc.collect()
    assert not is_mapped(path) and len(os.listdir("/proc/self/fd")) == descriptors
    parked, path = mirrored(tmp_path)
    qmove.park(parked)
    assert is_mapped(path)
    del parked
    gc.collect()
    assert not is_mapped(path)


# Refusals ----------------------------------------------------------------------------------------


def test_a_missing_file_and_a_broken_one_are_named(gpu: GPU, tmp_path: Path) -> None:
    model = layers(1)
    broken = tmp_path / "broken.safetensors"
    with pytest.raises(qmove.CannotMirror, match=r"no file .*nothing\.safetensors"):
        qmove.mirror_files(model, tmp_path / "nothing.safetensors")
    for content in (b"", b"PK\3\4 no safetensors at all", saved(model, tmp_path).read_bytes()[:-1]):
        broken.write_bytes(content)
        with pytest.raises(
            qmove.CannotMirror, match=r"broken\.safetensors is no whole safetensors file"
        ):
            qmove.mirror_files(model, [tmp_path / "model.safetensors", broken])


def test_without_mirrors_there_are_none_of_files(gpu: GPU, tmp_path: Path) -> None:
    model = layers(1)
    qmove.configure(keep_mirrors=False)
    with pytest.raises(qmove.CannotMirror, match=r"configure\(keep_mirrors=True\)"):
        qmove.mirror_files(model, saved(model, tmp_path))
