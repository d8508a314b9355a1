"""File-backed mirrors: the model is changed, or its file is."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qmove_core as qmove
from qmove_core.digests import digest
from qmove_core.memory import arena, blocks, mapped_files, pages
from qmove_core.memory.pages import PAGE
from tests.builders.device import GPU
from tests.builders.file_mirrors import mirrored, saved
from tests.builders.mirrors import BIAS, MODEL, WEIGHT, WIDTH, ones
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
    both = nn.ModuleList([layers(1, width=WIDTH), layers(1, width=WIDTH)])
    qmove.mirror_files(both, saved(both, tmp_path))
    qmove.park(both[0])
    qmove.park(both[1])
    qmove.restore(both[0], stream=True)
    both[1][0].weight.data.fill_(5)
    qmove.restore(both[1], stream=True)
    assert bool((both[1][0].weight == 5).all())


def test_a_resident_model_that_is_changed_is_parked_in_the_arena(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    in_file = path.read_bytes()
    model[2].weight.data.mul_(2)
    changed = contents(model)
    parked = qmove.park(model)
    assert (parked.copied_bytes, arena.bytes_in_use(), blocks.file_bytes()) == (
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


def test_a_file_that_changes_when_all_of_it_was_read_changes_nothing(
    gpu: GPU, tmp_path: Path
) -> None:
    model, path = mirrored(tmp_path)
    qmove.park(model)

    def overwritten(done: int, total: int) -> None:
        if done == total:
            overwrite(path, -8, b"\1\2\3\4")

    before = contents(model)
    qmove.restore(model, progress=overwritten)
    assert contents(model) == before, "all of it was read before"
    assert qmove.park(model).copied_bytes == WEIGHT, "what was overwritten is no mirror"
    assert contents(model) == before


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


# What times do not tell --------------------------------------------------------------------------


def overwrite_and_keep_the_times(path: Path, position: int, content: bytes) -> None:
    """As `rsync --inplace -t` and `cp -p` do it."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(position, os.SEEK_END)
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)


def settled(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the file be an hour old: what it was mapped with can be told from what came later."""
    later = time.time_ns() + 3600 * 10**9
    monkeypatch.setattr(mapped_files.time, "time_ns", lambda: later)


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten": lambda path: overwrite(path, -8, b"\1\2\3\4"),
    "overwritten, times kept": lambda path: overwrite_and_keep_the_times(path, -8, b"\1\2\3\4"),
    "shorter": lambda path: os.truncate(path, 5 * PAGE),
    "shorter, times kept": lambda path: truncate_and_keep_the_times(path),
    "longer": lambda path: overwrite_and_keep_the_times_longer(path),
    "empty": lambda path: os.truncate(path, 0),
}


def truncate_and_keep_the_times(path: Path) -> None:
    status = path.stat()
    os.truncate(path, 5 * PAGE)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def overwrite_and_keep_the_times_longer(path: Path) -> None:
    status = path.stat()
    overwrite_and_keep_the_times(path, -8, b"\1\2\3\4")
    os.truncate(path, status.st_size + 5)


@pytest.mark.parametrize("how", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("way", ["restore", "stream", "use", "swap", "no mirrors", "no digests"])
def test_a_parked_model_never_comes_home_with_the_bytes_of_a_changed_file(
    gpu: GPU,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[Path], object],
    is_settled: bool,
    way: str,
) -> None:
    if is_settled:
        settled(tmp_path, monkeypatch)
    model, path = mirrored(tmp_path)
    before, whole = contents(model), path.read_bytes()
    other = layers(1)
    qmove.park(model)
    how(path)
    if way == "no mirrors":
        qmove.configure(keep_mirrors=False)
    if way == "no digests":
        products = digest.products_on
        monkeypatch.setattr(
            digest, "products_on", lambda device: products(device) if device.type == "cpu" else None
        )
    with pytest.raises(qmove.MappedFileChanged, match=r"model\.safetensors"):
        if way == "use":
            model(ones())
        elif way == "swap":
            qmove.swap(other, model)
        else:
            qmove.restore(model, stream=way == "stream")
    assert qmove.is_parked(model)
    del other
    path.write_bytes(whole)  # into the same file
    qmove.restore(model)
    assert contents(model) == before


@pytest.mark.parametrize("how", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("way", ["park", "swap", "move"])
def test_the_copy_on_the_device_is_not_given_up_for_a_changed_file(
    gpu: GPU,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[Path], object],
    is_settled: bool,
    way: str,
) -> None:
    if is_settled:
        settled(tmp_path, monkeypatch)
    model, path = mirrored(tmp_path)
    before, other = contents(model), layers(1)
    qmove.park(other)
    how(path)
    if way == "park":
        copied = qmove.park(model).copied_bytes
    elif way == "swap":
        copied = qmove.swap(model, other)[0].copied_bytes
    else:
        copied = qmove.move(model, "cpu").copied_bytes
    assert (copied, contents(model), blocks.file_bytes()) == (MODEL, before, 0)


def test_without_a_time_that_nobody_can_set_the_file_is_read(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(tmp_path, monkeypatch)
    model, path = mirrored(tmp_path)
    before = contents(model)
    monkeypatch.setattr(mapped_files.os, "name", "nt")
    assert qmove.park(model).copied_bytes == 0
    monkeypatch.undo()
    qmove.restore(model)
    monkeypatch.setattr(mapped_files.os, "name", "nt")
    overwrite_and_keep_the_times(path, -8, b"\1\2\3\4")
    assert qmove.park(model).copied_bytes == MODEL and contents(model) == before


def test_a_settled_file_is_not_read_to_park(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(tmp_path, monkeypatch)
    model, _path = mirrored(tmp_path)
    monkeypatch.setattr(mapped_files.MappedFile, "_content", lambda *_: pytest.fail("it was read"))
    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("read_from", ["the file", "the map"])
def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error_and_not_a_crash(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_from: str
) -> None:
    model, path = mirrored(tmp_path)
    before, whole = contents(model), path.read_bytes()
    qmove.park(model)
    where, name = (
        (pages, "read") if read_from == "the map" else (mapped_files.MappedFile, "_read_past_cache")
    )
    read = getattr(where, name)

    def truncated(*arguments: Any) -> int:
        os.truncate(path, 5 * PAGE)
        return int(read(*arguments))

    with monkeypatch.context() as patched:
        patched.setattr(where, name, truncated)
        if read_from == "the map":  # as where nobody can tell whether it was written to
            patched.setattr(pages, "is_unwritten", lambda *_: False)
        with pytest.raises(qmove.MappedFileChanged, match=rf"it has {5 * PAGE} bytes now"):
            qmove.restore(model)
    path.write_bytes(whole)
    qmove.restore(model)
    assert contents(model) == before


def test_weights_that_were_changed_in_ram_are_told_from_a_changed_file(
    gpu: GPU, tmp_path: Path
) -> None:
    model, path = mirrored(tmp_path)
    qmove.park(model)
    model[1].weight.data.add_(1)
    changed = contents(model)
    os.utime(path, ns=(0, 0))
    qmove.restore(model)
    assert contents(model) == changed
    assert qmove.park(model).copied_bytes == WEIGHT
    model[0].weight.data.add_(1)
    overwrite_and_keep_the_times(path, -8, b"\1\2\3\4")
    with pytest.raises(qmove.MappedFileChanged):
        qmove.restore(model)
