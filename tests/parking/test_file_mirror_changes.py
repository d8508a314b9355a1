"""File-backed mirrors: the model is changed, or its file is."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, mapped_files
from qmove_core.memory.pages import PAGE
from tests.builders.device import GPU
from tests.builders.file_mirrors import mirrored, saved
from tests.builders.mirrors import BIAS, MODEL, WEIGHT, WIDTH
from tests.builders.models import layers
from tests.builders.snapshots import contents

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("no_files_mapped")]


# Changes of the model ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_parked_model_that_is_changed_comes_home_changed_and_the_file_stays(
    gpu: GPU, tmp_path: Path, stream: bool
) -> None:
    model, path = mirrored(tmp_path)
    before, in_file = contents(model), path.read_bytes()
    qmove.park(model)
    model[1].weight.data.add_(1)
    model[3].bias.data[5] = 7
    changed = contents(model)
    assert {name for name in before if before[name] != changed[name]} == {"1.weight", "3.bias"}
    for copied in (WEIGHT + BIAS, 0):
        qmove.restore(model, stream=stream)
        assert contents(model) == changed
        assert qmove.park(model).copied_bytes == copied
        assert arena.bytes_in_use() == WEIGHT + BIAS, (
            "what was changed lies there now, and no longer in the file"
        )
        assert contents(model) == changed
    assert path.read_bytes() == in_file


def test_a_write_after_one_restore_is_seen_by_the_next(gpu: GPU, tmp_path: Path) -> None:
    """What was locked for the first must not be what the second copies from."""
    both = nn.ModuleList([layers(1, width=WIDTH), layers(1, width=WIDTH)])
    qmove.mirror_files(both, saved(both, tmp_path))
    qmove.park(both[0])
    qmove.park(both[1])
    qmove.restore(both[0], stream=True)
    both[1][0].weight.data.fill_(5)
    pins = simcuda.host_counters().pins
    qmove.restore(both[1], stream=True)
    assert simcuda.host_counters().pins == pins + 1, "locked anew"
    assert bool((both[1][0].weight == 5).all())


def test_a_resident_model_that_is_changed_is_parked_in_the_arena(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    in_file = path.read_bytes()
    model[2].weight.data.mul_(2)
    changed = contents(model)
    parked = qmove.park(model)
    assert (parked.copied_bytes, arena.bytes_in_use(), mapped_files.nbytes()) == (
        WEIGHT,
        WEIGHT,
        MODEL - WEIGHT,
    )
    assert contents(model) == changed and path.read_bytes() == in_file
    qmove.restore(model)
    assert contents(model) == changed
    assert qmove.park(model).copied_bytes == 0


def test_the_ram_limit_does_not_count_files_and_trimming_does_not_take_them(
    gpu: GPU, tmp_path: Path
) -> None:
    model, _path = mirrored(tmp_path)
    qmove.configure(ram_limit=0)
    assert qmove.trim() == qmove.trim(MODEL) == 0
    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    model[0].weight.data.add_(1)
    with pytest.raises(qmove.NotEnoughMemory, match="ram_limit"):
        qmove.park(model)


def test_a_parked_model_can_be_copied_and_verified(gpu: GPU, tmp_path: Path) -> None:
    model, _path = mirrored(tmp_path)
    before = contents(model)
    qmove.configure(verify=True)
    assert qmove.park(model).verified
    twin = copy.deepcopy(model)
    assert qmove.restore(model).verified and contents(model) == before
    assert contents(twin) == before


# Changes of the file -----------------------------------------------------------------------------


def overwrite(path: Path, position: int, content: bytes) -> None:
    """In place, a moment later: the clock of a file system has ticks of some milliseconds."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END)
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_that_was_overwritten_in_place_is_an_error_that_names_it(
    gpu: GPU, tmp_path: Path, stream: bool
) -> None:
    model, path = mirrored(tmp_path)
    before, whole = contents(model), path.read_bytes()
    qmove.park(model)
    overwrite(path, -8, b"\1\2\3\4")
    with pytest.raises(qmove.MappedFileChanged, match=r"model\.safetensors") as caught:
        qmove.restore(model, stream=stream)
    assert isinstance(caught.value, qmove.QMoveError) and len(caught.value.names) == 1
    assert qmove.is_parked(model) and gpu.allocated() == 0
    overwrite(path, -len(whole), whole)
    qmove.restore(model, stream=stream)
    assert contents(model) == before


def test_a_file_that_became_shorter_is_an_error_and_not_a_crash(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    qmove.park(model)
    os.truncate(path, 5 * PAGE)
    with pytest.raises(qmove.MappedFileChanged, match=rf"it has {5 * PAGE} bytes now"):
        qmove.restore(model)
    assert qmove.is_parked(model)


def test_a_file_that_changes_while_it_is_copied_is_an_error(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    qmove.park(model)

    def overwritten(done: int, total: int) -> None:
        if done == total:
            overwrite(path, -8, b"\1\2\3\4")

    with pytest.raises(qmove.MappedFileChanged):
        qmove.restore(model, progress=overwritten)
    assert qmove.is_parked(model) and gpu.allocated() == 0


def test_a_file_that_was_only_touched_is_none(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    os.utime(path, ns=(0, 0))
    qmove.restore(model)
    assert contents(model) == before and qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("how", ["replaced", "deleted"])
def test_a_file_that_was_replaced_or_deleted_lives_on(gpu: GPU, tmp_path: Path, how: str) -> None:
    model, path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    if how == "deleted":
        path.unlink()
    else:
        (tmp_path / "new").write_bytes(b"something else")
        (tmp_path / "new").replace(path)
    qmove.restore(model)
    assert contents(model) == before and qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("how", ["overwritten", "shorter"])
def test_a_resident_model_whose_file_was_changed_is_parked_in_the_arena(
    gpu: GPU, tmp_path: Path, how: str
) -> None:
    model, path = mirrored(tmp_path)
    before = contents(model)
    if how == "shorter":
        os.truncate(path, 5 * PAGE)
    else:
        overwrite(path, -8, b"\1\2\3\4")
    assert qmove.park(model).copied_bytes == MODEL
    assert contents(model) == before
    qmove.restore(model)
    assert contents(model) == before and qmove.park(model).copied_bytes == 0
