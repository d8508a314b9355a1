"""Digests: equal for equal bytes wherever they lie, different for any change, in fixed memory and
few kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import simcuda
from qmove_core.digests import choosing, digest, digest_tree, gathering
from qmove_core.digests.digest import Digest, digest_storages, queue_digests
from qmove_core.digests.digest_tree import PIECE, ROW, FloatProducts, IntProducts
from qmove_core.storages import as_bytes
from tests.builders.device import GPU
from tests.builders.digests import try_out_anew

CPU = torch.device("cpu")
SIZES = [
    0,
    1,
    2,
    7,
    8,
    9,
    1023,
    1024,
    1025,
    31_000,
    33_333,
    PIECE - 1,
    PIECE,
    PIECE + 1,
    3 * PIECE + 5,
]
LARGE = gathering.IN_PLACE + PIECE + 1001  # read where it lies, but for its last bytes


def storage_of(nbytes: int, device: torch.device = CPU, seed: int = 0) -> torch.UntypedStorage:
    """Random bytes, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)
        .to(device)
        .untyped_storage()
    )


def changed(storage: torch.UntypedStorage, *places: int, bit: int = 1) -> Digest:
    """The digest with that bit changed at each of these bytes, which are then as before."""
    content = as_bytes(storage)
    for place in places:
        content[place] ^= bit
    found = one(storage)
    for place in places:
        content[place] ^= bit
    return found


def one(storage: torch.UntypedStorage) -> Digest:
    return digest_storages([storage])[0]


class Launches(TorchDispatchMode):
    """Counts what is queued on the device: every operator that is no view and allocates nothing
    only."""

    FREE = (
        "empty",
        "view",
        "slice",
        "set_",
        "split",
        "t.",
        "as_strided",
        "_reshape_alias",
        "detach",
        "transpose",
        "alias",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Devices are tried out anew, in the test and after it."""
    try_out_anew()
    yield
    try_out_anew()


@pytest.fixture
def tried(gpu: GPU) -> GPU:
    """A device that was tried out before, so that only the digests themselves are counted."""
    assert choosing.available(gpu.device)
    gpu.reset_peak()
    if simcuda.is_active():
        simcuda.reset_counters()
    return gpu


# What a digest says


@pytest.mark.parametrize("nbytes", SIZES)
def test_equal_bytes_have_equal_digests_on_every_device(gpu: GPU, nbytes: int) -> None:
    assert one(storage_of(nbytes)) == one(storage_of(nbytes)) == one(storage_of(nbytes, gpu.device))


def test_a_large_storage_has_the_same_digest_on_every_device(gpu: GPU) -> None:
    assert one(storage_of(LARGE)) == one(storage_of(LARGE, gpu.device))


@pytest.mark.parametrize("nbytes", [1, 3, ROW - 1, ROW + 1, 40 * ROW + 3, PIECE + 1, LARGE])
def test_one_changed_bit_anywhere_shows(gpu: GPU, nbytes: int) -> None:
    storage = storage_of(nbytes, gpu.device)
    borders = {0, nbytes // 2, nbytes - 1} | {
        place
        for border in (8, ROW, 20 * ROW, 32 * ROW, PIECE, nbytes // PIECE * PIECE)
        for place in (border - 1, border)
        if 0 <= place < nbytes
    }
    found = [one(storage)] + [
        changed(storage, place, bit=bit) for place in sorted(borders) for bit in (1, 128)
    ]
    assert len(set(found)) == len(found)
    assert one(storage) == found[0]


@pytest.mark.parametrize("distance", [4, 8, 16, ROW, 32 * ROW, PIECE])
def test_two_changed_signs_do_not_cancel(gpu: GPU, distance: int) -> None:
    storage = storage_of(2 * PIECE, gpu.device)
    assert changed(storage, 7, 7 + distance, bit=128) != one(storage)


@pytest.mark.parametrize("block", [1, 4, 8, ROW, 32 * ROW, PIECE])
def test_exchanged_blocks_show(gpu: GPU, block: int) -> None:
    storage = storage_of(2 * PIECE, gpu.device)
    before, content = one(storage), as_bytes(storage)
    first = content[:block].clone()
    content[:block] = content[block : 2 * block]
    content[block : 2 * block] = first
    assert one(storage) != before


def test_zeros_of_different_lengths_differ(gpu: GPU) -> None:
    lengths = [0, 1, 2, 8, ROW, ROW + 1, 2 * ROW, PIECE, PIECE + ROW, 2 * PIECE, gathering.IN_PLACE]
    zeros = [
        torch.zeros(n, dtype=torch.uint8, device=gpu.device).untyped_storage() for n in lengths
    ]
    assert len(set(digest_storages(zeros))) == len(lengths)


def test_a_digest_depends_on_no_neighbour_and_no_order(gpu: GPU) -> None:
    storages = [storage_of(n, gpu.device, seed) for seed, n in enumerate([*SIZES, *SIZES, LARGE])]
    together = digest_storages(storages)
    assert together == [one(storage) for storage in storages]
    assert digest_storages(storages[::-1]) == together[::-1]


def test_equal_content_has_equal_digests_side_by_side(gpu: GPU) -> None:
    assert len(set(digest_storages([storage_of(ROW, gpu.device) for _ in range(600)]))) == 1


def test_a_write_through_data_shows(gpu: GPU) -> None:
    weight = torch.nn.Parameter(torch.ones(300, 70, device=gpu.device))
    before, version = one(weight.untyped_storage()), weight._version
    weight.data[299, 69] = 2.0
    assert weight._version == version, "the premise: versions cannot tell"
    assert one(weight.untyped_storage()) != before


def test_no_storages_have_no_digests() -> None:
    assert digest_storages([]) == []


def test_empty_storages_are_equal(gpu: GPU) -> None:
    assert len(set(digest_storages([storage_of(0, gpu.device), storage_of(0, gpu.device)]))) == 1


def test_storages_of_two_devices_are_refused(gpu: GPU) -> None:
    with pytest.raises(ValueError, match="one device at a time"):
        digest_storages([storage_of(8), storage_of(8, gpu.device)])


def test_the_products_are_those_of_whole_numbers() -> None:
    """Against numpy's int64, written down a second time, so that a digest never rests on a rounded
    sum."""
    nbytes = 100 * ROW - 10  # 7 groups, the last of 4 rows
    storage = storage_of(nbytes)
    numbers = digest_tree.matrices(CPU).numpy().astype(np.int64)
    rows = np.zeros((PIECE // ROW, ROW), np.int8)  # a whole piece, most of it zeros
    rows.reshape(-1)[:nbytes] = as_bytes(storage).numpy().view(np.int8)
    products = rows
    for width in (1024, 512, 1024):
        matrix, numbers = numbers[: 8 * width].reshape(8, width).T, numbers[8 * width :]
        products = (products.view(np.int8).reshape(-1, width) @ matrix).astype(np.int32)
    assert one(storage) == digest._combined(nbytes, memoryview(products.tobytes()), [0])


# Callers


def test_inference_mode_autocast_and_default_device_change_nothing(gpu: GPU) -> None:
    storages = [storage_of(n, gpu.device) for n in SIZES]
    on_host = [storage_of(n) for n in SIZES]
    expected = digest_storages(storages)
    with torch.inference_mode():
        made_inside = torch.ones(ROW, device=gpu.device)
        assert digest_storages(storages) == digest_storages(on_host) == expected
        assert one(made_inside.untyped_storage()) == one(torch.ones(ROW).untyped_storage())
    with torch.autocast("cuda"), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        assert digest_storages(storages) == digest_storages(on_host) == expected


def test_pending_digests_are_of_what_lay_there_when_they_were_queued(gpu: GPU) -> None:
    """On a side stream, after a copy that is still under way, and before the next write on that
    stream."""
    source = torch.full((LARGE,), 7, dtype=torch.uint8).pin_memory()
    target = torch.zeros(LARGE, dtype=torch.uint8, device=gpu.device)
    torch.accelerator.synchronize()
    stream = torch.Stream(gpu.device)
    with torch.get_device_module(gpu.device).stream(stream):
        target.copy_(source, non_blocking=True)
        pending = queue_digests([target.untyped_storage()])
        target.zero_()
    assert pending.values() == digest_storages([source[:].clone().untyped_storage()])
    assert pending.values() is pending.values()


@pytest.mark.simulated
def test_reading_waits_for_no_other_stream(tried: GPU) -> None:
    storage = storage_of(100_000, tried.device)
    expected = digest_storages([storage])
    stream = torch.Stream(tried.device)
    with torch.get_device_module(tried.device).stream(stream):
        pending = queue_digests([storage])
    started = simcuda.clock.now()
    simcuda.clock.compute(10.0)
    assert pending.values() == expected
    assert simcuda.clock.now() - started < 1.0


# Memory and kernels


def test_memory_is_bounded_and_given_back(tried: GPU) -> None:
    small = [storage_of(100_000, tried.device) for _ in range(100)] * 10
    large = [torch.zeros(200 << 20, dtype=torch.uint8, device=tried.device).untyped_storage()]
    before = tried.allocated()
    tried.reset_peak()
    pending = queue_digests(small + large)
    results = (1000 + 400 + digest_tree.SPARE) * digest_tree.PRODUCT
    assert tried.allocated() - before <= results + digest_tree._NUMBERS, (
        "only the results stay, and the numbers"
    )
    pending.values()
    assert tried.peak() - before <= gathering.STAGING + 1400 * digest_tree.PRODUCT
    assert tried.allocated() == before


def test_a_single_large_storage_takes_little(tried: GPU) -> None:
    nbytes = 100 << 20
    storage = torch.zeros(nbytes, dtype=torch.uint8, device=tried.device).untyped_storage()
    before = tried.allocated()
    tried.reset_peak()
    one(storage)
    assert tried.peak() - before <= nbytes // 20


def launches(storages: Sequence[torch.UntypedStorage]) -> list[str]:
    with Launches() as counted:
        digest_storages(storages)
    return counted.names


def test_many_storages_take_few_kernels(tried: GPU) -> None:
    few = launches([storage_of(100_000, tried.device)])
    many = launches([storage_of(100_000, tried.device)] * 2_000)
    gathered = -(-2_000 * 100 * ROW // (gathering.STAGING * 3 // 4))  # batches
    assert len(many) - len(few) <= 2 * gathered + 2
    assert sum("_int_mm" in name for name in many) <= gathered + 2


def test_a_large_storage_is_read_where_it_lies(tried: GPU) -> None:
    names = launches(
        [torch.zeros(40 * PIECE, dtype=torch.uint8, device=tried.device).untyped_storage()]
    )
    assert not any("cat" in name for name in names)
    assert sum("_int_mm" in name for name in names) == 3


@pytest.mark.simulated
def test_a_nearly_full_device_gets_a_smaller_staging(tried: GPU) -> None:
    storages = [storage_of(100_000, tried.device, seed) for seed in range(300)] + [
        storage_of(LARGE, tried.device)
    ]
    expected = digest_storages(storages)
    simcuda.set_memory(simcuda.counters(0).allocated + (2 << 20))
    assert digest_storages(storages) == expected


@pytest.mark.simulated
def test_a_full_device_is_said_so_and_left_as_it_was(
    tried: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    storages = [storage_of(100_000, tried.device, seed) for seed in range(300)]
    before = simcuda.counters(0).allocated
    simcuda.set_memory(before + (512 << 10))
    with caplog.at_level(logging.INFO, "qmove"):
        assert digest_storages(storages) == [None] * 300
    assert "1048576 bytes that digests take" in caplog.text
    assert simcuda.counters(0).allocated == before


# Devices that cannot multiply


def test_without_int_products_those_of_floats_are_taken(
    gpu: GPU, fresh_choice: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("_int_mm_out_cuda not compiled for this device")

    storages = [storage_of(n, gpu.device) for n in (*SIZES, LARGE)]
    expected = digest_storages(storages)
    try_out_anew()
    monkeypatch.setattr(torch, "_int_mm", missing)
    with caplog.at_level(logging.INFO, "qmove"):
        assert digest_storages(storages) == expected
    assert choosing.products_on(gpu.device) is FloatProducts
    assert "do not use IntProducts: _int_mm_out_cuda not compiled" in caplog.text


def _one_off(multiply):
    """A device that is wrong by one, in the last of what it multiplies."""

    def wrong(self: object, level: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        multiply(self, level, rows, out)
        if out.device.type != "cpu" and level == 0:
            out[0, 7] += 1

    return wrong


def test_a_way_that_is_wrong_is_not_taken(
    gpu: GPU, fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IntProducts, "multiply", _one_off(IntProducts.multiply))
    assert choosing.available(gpu.device)
    assert choosing.products_on(gpu.device) is FloatProducts


def test_a_device_that_is_wrong_in_every_way_has_no_digests(
    gpu: GPU, fresh_choice: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = storage_of(8, gpu.device)
    monkeypatch.setattr(IntProducts, "multiply", _one_off(IntProducts.multiply))
    monkeypatch.setattr(FloatProducts, "multiply", _one_off(FloatProducts.multiply))
    assert not choosing.available(gpu.device)
    assert choosing.available(CPU)
    assert digest_storages([storage]) == [None]
