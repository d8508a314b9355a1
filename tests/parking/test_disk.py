"""`park(to="disk")`: a model lies in a file on the disk as it lay in RAM, and no RAM is taken."""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory import disk_files
from qmove_core.memory.disk_files import WEIGHTS
from qmove_core.memory.mapped_files import WINDOW
from qmove_core.parking import streaming
from tests.builders.arena import MIB
from tests.builders.device import GPU
from tests.builders.disk import Steps, counted, files_in, manifest_of, raises
from tests.builders.file_mirrors import mirrored
from tests.builders.formats import MODELS, x_of
from tests.builders.mirrors import MODEL, WIDTH
from tests.builders.models import layers
from tests.builders.snapshots import contents, snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("no_files_mapped")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "parked"
    qmove.configure(disk_folder=folder)
    yield folder
    gc.collect()


def taken() -> tuple[int, int, int, int]:
    """Bytes of host memory in the arena, in mirrors and spares, and of mapped files."""
    stats = qmove.stats()
    return stats.arena_bytes, stats.mirror_bytes, stats.spare_bytes, stats.file_bytes


def test_from_vram_it_takes_no_ram_and_comes_home_exact(gpu: GPU, folder: Path) -> None:
    model = layers(4, width=WIDTH)
    before = snapshot(model)
    parked = qmove.park(model, to="disk")
    assert (parked.copied_bytes, parked.nbytes, gpu.allocated()) == (MODEL, MODEL, 0)
    assert taken() == (0, 0, 0, MODEL) and len(files_in(folder)) == 1
    assert set(parked.home.values()) == {torch.device("cuda:0")} and parked.stragglers == []
    parked.restore()
    assert snapshot(model) == before


def test_from_ram_it_gives_all_of_it_back(gpu: GPU, folder: Path) -> None:
    model = layers(4, width=WIDTH)
    before = snapshot(model)
    qmove.park(model)
    assert taken()[0] >= MODEL
    parked = qmove.park(model, to="disk")
    assert taken() == (0, 0, 0, MODEL) and parked.copied_bytes == MODEL
    assert set(parked.home.values()) == {torch.device("cuda:0")}
    assert qmove.is_parked(model) and qmove.parked_models() == [model]
    qmove.restore(model)
    assert snapshot(model) == before


def test_it_is_written_once_while_it_stays_as_it_is(gpu: GPU, folder: Path) -> None:
    model = layers(4, width=WIDTH)
    with counted(Steps()) as steps:
        qmove.park(model, to="disk")
        written = steps.count
        for again in ({}, {"to": "disk"}, {}):
            qmove.restore(model)
            assert qmove.park(model, **again).copied_bytes == 0  # type: ignore[arg-type]
            assert qmove.park(model, to="disk").copied_bytes == 0
    assert steps.count == written and taken() == (0, 0, 0, MODEL)


def test_what_was_changed_at_home_is_written_anew_and_alone(gpu: GPU, folder: Path) -> None:
    model = layers(4, width=WIDTH)
    qmove.park(model, to="disk")
    qmove.restore(model)
    model[1].weight.data.add_(1)
    before = contents(model)
    assert qmove.park(model, to="disk").copied_bytes == model[1].weight.nbytes
    qmove.restore(model)
    assert contents(model) == before


@pytest.mark.parametrize("stays", [False, True])
def test_a_mirror_in_ram_is_written_only_while_it_is_true(
    gpu: GPU, folder: Path, stays: bool
) -> None:
    model = layers(4, width=WIDTH)
    qmove.park(model)
    qmove.restore(model)
    model[1].weight.data.add_(1)
    before = contents(model)
    qmove.park(model, to="disk", folder=folder if stays else None)
    assert taken() == (0, 0, 0, MODEL)
    qmove.restore(model)
    assert contents(model) == before


def test_what_was_changed_while_it_lay_there_is_kept(gpu: GPU, folder: Path) -> None:
    model = layers(4, width=WIDTH)
    qmove.park(model, to="disk")
    model[1].weight.data[0, 0] = 7  # a page of RAM of its own
    before = contents(model)
    assert qmove.park(model, to="disk").copied_bytes == model[1].weight.nbytes
    assert contents(model) == before
    qmove.restore(model)
    assert contents(model) == before and float(model[1].weight[0, 0]) == 7


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["vram", "ram"])
def test_every_format_wakes_to_the_same_results(
    gpu: GPU, second_gpu: GPU, folder: Path, name: str, first: str
) -> None:
    model = MODELS[name]()
    x = x_of(model)
    wanted = model(x)
    before = snapshot(model)
    if first == "ram":
        qmove.park(model)
    qmove.park(model, to="disk")
    assert torch.equal(model(x), wanted)
    streaming.wait_for()
    assert snapshot(model) == before


WAYS_HOME: dict[str, Callable[[nn.Module], object]] = {
    "restore": qmove.restore,
    "stream": lambda model: qmove.restore(model, stream=True),
    "prefetch": qmove.prefetch,
    "elsewhere": lambda model: qmove.restore(model, "cuda:1"),
    "move": lambda model: qmove.move(model, "cuda:1"),
    "cpu": lambda model: qmove.move(model, "cpu"),
    "swap": lambda model: qmove.swap(layers(2), model),
}


@pytest.mark.parametrize("way", WAYS_HOME)
def test_it_comes_home_in_every_way(gpu: GPU, second_gpu: GPU, folder: Path, way: str) -> None:
    model = layers(4, width=WIDTH)
    before = contents(model)
    qmove.park(model, to="disk")
    WAYS_HOME[way](model)
    streaming.wait_for()
    assert contents(model) == before
    assert not qmove.is_parked(model)


@pytest.mark.parametrize("bytes_of_it", [WINDOW - 4, WINDOW, WINDOW + 4, 2 * WINDOW + MIB])
def test_storages_around_the_size_of_a_window(gpu: GPU, folder: Path, bytes_of_it: int) -> None:
    count = bytes_of_it // 4
    model = nn.ParameterDict({"big": torch.arange(count, dtype=torch.float32, device="cuda")})
    model["small"] = torch.arange(3, dtype=torch.float32, device="cuda")
    before = contents(model)
    qmove.park(model, to="disk")
    qmove.restore(model)
    assert contents(model) == before


def test_a_weight_that_two_models_share_stays_one(gpu: GPU, folder: Path) -> None:
    model, other = layers(3), layers(3)
    other[0].weight = model[0].weight
    other[1].weight = nn.Parameter(model[1].weight.data, requires_grad=False)
    before = contents([model, other])
    qmove.park(model)
    qmove.park(other)
    qmove.park(model, to="disk")
    qmove.park(other, to="disk")
    assert taken()[:3] == (0, 0, 0)
    qmove.restore(model)
    qmove.restore(other)
    assert contents([model, other]) == before
    assert other[1].weight.data_ptr() == model[1].weight.data_ptr()


def test_tensors_outside_of_the_model_come_along(gpu: GPU, folder: Path) -> None:
    model = layers(2)
    kept = model[0].weight.data[3:]
    qmove.park(model)
    parked = qmove.park(model, to="disk")
    assert parked.stragglers == [] and taken()[0] == 0
    qmove.restore(model)
    assert kept.device == model[0].weight.device and torch.equal(kept, model[0].weight.data[3:])


def test_a_temporary_file_goes_with_its_model(gpu: GPU, folder: Path) -> None:
    model = layers(2)
    qmove.park(model, to="disk")
    assert len(files_in(folder)) == 1
    del model
    gc.collect()
    assert files_in(folder) == []


def test_what_is_in_the_models_own_checkpoint_is_not_written(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    assert qmove.park(model, to="disk").copied_bytes == 0, "it lies in a file already"
    qmove.restore(model)
    model[0].weight.data.add_(1)
    changed = model[0].weight.nbytes
    qmove.park(model, to="disk", folder=tmp_path / "kept")
    manifest = manifest_of(tmp_path / "kept" / WEIGHTS)
    references = [s for s in manifest["storages"] if s["file"] is not None]
    assert sum(s["nbytes"] for s in references) == MODEL - changed
    assert {s["file"] for s in references} == {str(path.resolve())}
    assert (tmp_path / "kept" / WEIGHTS).stat().st_size < MODEL


def test_verify_proves_what_was_written(gpu: GPU, folder: Path) -> None:
    qmove.configure(verify=True)
    model = layers(2)
    assert qmove.park(model, to="disk").verified
    assert qmove.restore(model).verified


def test_progress_is_told_and_can_stop_it(gpu: GPU, folder: Path) -> None:
    model, told = layers(4, width=WIDTH), list[tuple[int, int]]()
    before = snapshot(model)

    class Enough(OSError):
        pass

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if done > total // 2:
            raise Enough

    with pytest.raises(Enough):
        qmove.park(model, to="disk", progress=stop)
    assert snapshot(model) == before and files_in(folder) == []
    qmove.park(model, to="disk", progress=lambda *both: told.append(both))
    assert told[-1] == (MODEL, MODEL)


# What is in the way ------------------------------------------------------------------------------


def refused(model: nn.Module, **options: Any) -> qmove.CannotWriteToDisk:
    """The model stays where it is, to every byte, and can be parked afterwards."""
    before = snapshot(model)
    with pytest.raises(qmove.CannotWriteToDisk) as caught:
        qmove.park(model, to="disk", **options)
    assert snapshot(model) == before
    qmove.park(model)
    qmove.restore(model)
    assert contents(model) == {name: held[1] for name, held in before.items()}
    return caught.value


@pytest.mark.parametrize("parked_before", [False, True])
def test_a_disk_that_becomes_full_at_any_step(
    gpu: GPU, folder: Path, parked_before: bool, tmp_path: Path
) -> None:
    with counted(Steps()) as steps:
        qmove.park(layers(3), to="disk", folder=tmp_path / "counted")
    assert steps.count > 6
    for number in range(1, steps.count + 1):
        model = layers(3)
        if parked_before:
            qmove.park(model)
        fail = raises(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with counted(Steps(number, fail)):
            error = refused(model, folder=tmp_path / "full")
        assert str(tmp_path / "full") in str(error) and "No space left" in str(error)
        left = [name for name in files_in(tmp_path / "full") if name != WEIGHTS]
        assert left == [], "the last step, the folder's own sync, comes after the rename"


def test_too_little_room_is_seen_before_anything_is_written(
    gpu: GPU, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_files, "room_in", lambda _folder: 1000)
    with counted(Steps()) as steps:
        error = refused(layers(3))
    assert steps.count == 0 and "1000 B are free" in str(error)


def test_a_limit_on_the_size_of_files(gpu: GPU, folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        error = refused(layers(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in str(error) and files_in(folder) == []


def test_a_folder_that_nobody_may_write_to(gpu: GPU, folder: Path) -> None:
    fail = raises(PermissionError(errno.EACCES, "Permission denied", str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_files, "_make", lambda *_: fail())
        error = refused(layers(2))
    assert error.path == folder and "this user may write to" in str(error)


def test_a_folder_whose_disk_is_not_there(gpu: GPU, tmp_path: Path) -> None:
    error = refused(layers(2), folder=tmp_path / "not mounted" / "models")
    assert error.path == tmp_path / "not mounted" / "models"
    assert f"Make {tmp_path / 'not mounted'}" in str(error)


def test_a_file_in_place_of_the_folder(gpu: GPU, folder: Path) -> None:
    folder.write_text("a file")
    assert refused(layers(2)).path == folder


def test_without_a_folder(gpu: GPU) -> None:
    qmove.configure(disk_folder=None)
    error = refused(layers(2))
    assert error.path is None and "qmove.configure(disk_folder=" in str(error)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"to": "tape"}, "'tape'"), ({"folder": "x"}, 'to="disk" only')],
)
def test_places_that_are_none(gpu: GPU, options: dict[str, Any], match: str) -> None:
    model = layers(1)
    with pytest.raises(ValueError, match=match):
        qmove.park(model, **options)
    assert not qmove.is_parked(model)


@pytest.mark.parametrize("harm", ["altered", "cut short"])
def test_a_file_that_was_harmed_gives_an_error_and_never_wrong_weights(
    gpu: GPU, tmp_path: Path, harm: str
) -> None:
    model = layers(4, width=WIDTH)
    qmove.park(model, to="disk", folder=tmp_path / "kept")
    file = tmp_path / "kept" / WEIGHTS
    whole = file.read_bytes()
    if harm == "altered":
        with file.open("r+b") as content:
            content.seek(len(whole) - 100)
            content.write(b"\xff" * 8)
    else:
        os.truncate(file, len(whole) - 2 * 4096)
    with pytest.raises(qmove.MappedFileChanged, match=r"weights\.safetensors") as caught:
        qmove.restore(model)
    assert caught.value.names and qmove.is_parked(model) and gpu.allocated() == 0
    with file.open("r+b") as content:
        content.write(whole)
    qmove.restore(model)


def test_a_file_that_is_removed_while_its_model_lies_there_does_no_harm(
    gpu: GPU, folder: Path
) -> None:
    model = layers(2)
    before = contents(model)
    qmove.park(model, to="disk")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    qmove.restore(model)
    assert contents(model) == before
