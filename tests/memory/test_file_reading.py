"""What is restored from files is read ahead of its use, each byte once and past the page cache, and
proved on the way; whatever the file system and the system offer for that."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qmove_core as qmove
from qmove_core import workers
from qmove_core.digests.checksum import Checksum, checksum_of, sums_of
from qmove_core.memory import file_reading, mapped_files, pages, ring
from qmove_core.memory.disk_files import WEIGHTS
from qmove_core.memory.file_reading import ReadAhead
from qmove_core.memory.mapped_files import MappedFile, MappedFileChanged
from qmove_core.memory.pages import PAGE
from qmove_core.memory.ring import Ring
from tests.builders.byte_tensors import MIB, equal, on_host, tensors
from tests.builders.device import GPU
from tests.builders.snapshots import contents

pytestmark = pytest.mark.simulated

SIZES = [2 * MIB, 1000, 3 * MIB, 300_001, 7, 64, PAGE, MIB - 1, 9 * MIB + 3]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SLOT", MIB)


def parked(folder: Path) -> tuple[list[torch.Tensor], list[torch.Tensor], Path]:
    """A model that lies in a file, what it has, and the file."""
    model = tensors(*SIZES)
    expected = on_host(model)
    qmove.park(model, to="disk", folder=folder / "kept")
    return model, expected, folder / "kept" / WEIGHTS


def held(content: list[torch.Tensor]) -> nn.ParameterDict:
    return nn.ParameterDict({str(i): nn.Parameter(t, False) for i, t in enumerate(content)})


class Reads:
    """Notes what is read from files, as (start, end)."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.noted: list[tuple[int, int]] = []
        read = MappedFile.read_into

        def noting(file: MappedFile, room: Any, start: int, end: int) -> Any:
            self.noted.append((start, end))
            return read(file, room, start, end)

        patch.setattr(MappedFile, "read_into", noting)

    @property
    def nbytes(self) -> int:
        return sum(end - start for start, end in self.noted)


BACK: dict[str, Callable[[Any], object]] = {
    "restore": qmove.restore,
    "stream": lambda model: qmove.restore(model, stream=True),
    "to RAM": lambda model: qmove.move(model, "cpu"),
}


@pytest.mark.parametrize("way", BACK)
def test_each_byte_is_read_once(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    model, expected, _file = parked(tmp_path)
    reads = Reads(monkeypatch)
    BACK[way](model)
    assert equal(model, expected)
    gaps = 64 * len(SIZES)
    assert sum(SIZES) <= reads.nbytes <= sum(SIZES) + gaps
    starts = [start for start, _ in sorted(reads.noted)]
    ends = [end for _, end in sorted(reads.noted)]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_attach_reads_each_byte_once_to_prove_it(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = held(tensors(*SIZES))
    before = contents(model)
    qmove.park(model, to="disk", folder=tmp_path / "kept")
    twin = held([torch.zeros_like(tensor) for tensor in tensors(*SIZES)])
    reads = Reads(monkeypatch)
    qmove.attach(twin, tmp_path / "kept")
    assert sum(SIZES) <= reads.nbytes <= sum(SIZES) + 64 * len(SIZES)
    qmove.restore(twin)
    assert contents(twin) == before


def test_the_next_stretches_are_read_while_one_is_used(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is not given back before two others have begun: a reader that waits for its
    turn would wait for ever."""
    begun, model_file = threading.Semaphore(0), parked(tmp_path)
    read = MappedFile.read_into

    def counting(file: MappedFile, room: Any, start: int, end: int) -> Any:
        begun.release()
        return read(file, room, start, end)

    monkeypatch.setattr(MappedFile, "read_into", counting)
    model, expected, _file = model_file
    copied = threading.Event()
    bring = ReadAhead.bring

    def after_three(ahead: ReadAhead, start: int, target: torch.Tensor, stream: Any = None) -> Any:
        if not copied.is_set():
            for _ in range(3):
                ahead._current()
                assert begun.acquire(timeout=60)
            copied.set()
        return bring(ahead, start, target, stream)

    monkeypatch.setattr(ReadAhead, "bring", after_three)
    qmove.restore(model)
    assert equal(model, expected) and copied.is_set()


# What the system offers --------------------------------------------------------------------------


def no_direct(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mapped_files, "_open_past_cache", lambda _file: None)


def preadv(patch: pytest.MonkeyPatch, instead: Callable[..., int]) -> None:
    real = os.preadv
    patch.setattr(os, "preadv", lambda *arguments: instead(real, *arguments))


def is_direct(descriptor: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def refused(patch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """The file system lets the file be opened so, and refuses to read (after some reads)."""
    left = [after]

    def read(real: Any, descriptor: int, *arguments: Any) -> int:
        if is_direct(descriptor):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EINVAL, "Invalid argument")
        return int(real(descriptor, *arguments))

    preadv(patch, read)


def short(patch: pytest.MonkeyPatch) -> None:
    """Each read gives less than was asked for."""

    def read(real: Any, descriptor: int, buffers: Any, *arguments: Any) -> int:
        step = 3 * PAGE if is_direct(descriptor) else 5000
        return int(real(descriptor, [memoryview(buffers[0])[:step]], *arguments))

    preadv(patch, read)


def nobody_can_tell_what_is_cached(patch: pytest.MonkeyPatch) -> None:
    def read(real: Any, *arguments: Any) -> int:
        if len(arguments) == 4:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return int(real(*arguments))

    preadv(patch, read)


def no_preadv(patch: pytest.MonkeyPatch) -> None:
    patch.delattr(os, "preadv")
    patch.delattr(os, "RWF_NOWAIT")


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "no reads past the page cache": no_direct,
    "they are refused": refused,
    "they are refused later": lambda patch: refused(patch, after=3),
    "short reads": short,
    "nobody can tell what is cached": nobody_can_tell_what_is_cached,
    "no preadv, as on Windows": no_preadv,
    "nobody can tell what was written to": lambda patch: patch.setattr(
        pages, "is_unwritten", lambda *_: False
    ),
    "no more threads": lambda patch: patch.setattr(workers, "submit_read", lambda *_: None),
}


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="there is nothing to do without")
@pytest.mark.parametrize("system", SYSTEMS)
def test_it_comes_home_whatever_the_system_offers(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    SYSTEMS[system](monkeypatch)
    model, expected, file = parked(tmp_path)
    for way in ("restore", "to RAM"):
        BACK[way](model)
        assert equal(model, expected), way
        qmove.restore(model, "cuda:0")
        qmove.park(model, to="disk", folder=tmp_path / way)
    for _ in range(2):
        os.posix_fadvise(os.open(file, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        qmove.restore(model)
        assert equal(model, expected)
        qmove.park(model)


def test_a_disk_that_gives_an_error_is_named(
    gpu: GPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected, file = parked(tmp_path)
    with monkeypatch.context() as patch:

        def broken(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        preadv(patch, broken)
        with pytest.raises(OSError, match=r"Input/output error.*weights\.safetensors"):
            qmove.restore(model)
    assert qmove.is_parked(model) and gpu.allocated() == 0
    qmove.restore(model)
    assert equal(model, expected) and file.exists()


# Proof -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BACK)
def test_an_altered_file_gives_no_way_home(gpu: GPU, tmp_path: Path, way: str) -> None:
    model, expected, file = parked(tmp_path)
    whole = file.read_bytes()
    with file.open("r+b") as content:
        content.seek(len(whole) // 2)
        content.write(bytes(byte ^ 0xFF for byte in whole[len(whole) // 2 :][:8]))
    with pytest.raises(MappedFileChanged, match=r"weights\.safetensors"):
        BACK[way](model)
    assert qmove.is_parked(model) and gpu.allocated() == 0
    with file.open("r+b") as content:
        content.write(whole)
    BACK[way](model)
    assert equal(model, expected)


@pytest.mark.parametrize("way", BACK)
def test_what_its_owner_has_written_meanwhile_comes_home(
    gpu: GPU, tmp_path: Path, way: str
) -> None:
    model, expected, _file = parked(tmp_path)
    for index in (0, 3, 8):
        for each in (model[index].data, expected[index]):
            each[-1] ^= 0x5A
    BACK[way](model)
    assert equal(model, expected)


@pytest.mark.parametrize("gap", [0, 1, 2, 4, 61, 65, PAGE])
def test_tensors_that_lie_anywhere_in_a_file(gpu: GPU, tmp_path: Path, gap: int) -> None:
    """Other writers' files begin a tensor at any multiple of its own element size."""
    content = numpy.random.default_rng(0).integers(0, 256, 6 * MIB, numpy.uint8)
    path = tmp_path / "file"
    path.write_bytes(content.tobytes())
    file, at, wanted = MappedFile(path), 3, []
    for size in (5, MIB + 3, 7, 2 * MIB + 1, 64, MIB // 2):
        checksum = checksum_of(torch.from_numpy(content[at : at + size]))
        storage = file.storage_known(str(at), at, at + size, checksum, lambda _: None, fresh=True)
        wanted.append((storage, at, size))
        at += size + gap
    with_ring = Ring(6 * MIB)
    try:
        with ReadAhead(with_ring, [(file, at) for _, at, _ in wanted]) as ahead:
            for _storage, at, size in wanted:
                target = torch.zeros(size, dtype=torch.uint8)
                ahead.bring(at, target)
                assert numpy.array_equal(target.numpy(), content[at : at + size])
                assert file.part_at(at).is_proved
    finally:
        with_ring.end()


@pytest.mark.parametrize("cut", [8, 4096, (1 << 19) - 8, 1 << 19, (1 << 20) + 8])
def test_sums_of_parts_make_the_same_checksum(cut: int) -> None:
    content = torch.from_numpy(
        numpy.random.default_rng(cut).integers(0, 256, 2 * MIB + 5, numpy.uint8)
    )
    checksum = Checksum(len(content))
    for start in range(0, len(content), cut):
        checksum.add(sums_of(content[start : start + cut], start))
        if start > 200 * cut:
            checksum.add(sums_of(content[start + cut :], start + cut))
            break
    assert checksum.value == checksum_of(content)


def test_two_files_and_two_devices_at_once(gpu: GPU, second_gpu: GPU, tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "a": held(tensors(MIB, 5, 2 * MIB)),
            "b": held([tensor.to("cuda:1") for tensor in tensors(9, MIB, 700_000)]),
        }
    )
    before = contents(model)
    for name in ("a", "b"):
        state = {key: tensor.cpu() for key, tensor in model[name].state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
        qmove.mirror_files(model[name], tmp_path / f"{name}.safetensors")
    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert contents(model) == before
    assert file_reading._AHEAD < ring.SLOTS
