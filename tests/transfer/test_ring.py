"""Where host memory may not be page-locked, bytes pass through a small ring that is, and copies stay
asynchronous."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import devices
from qmove_core.memory import arena, blocks, pages, ring
from tests.builders.byte_tensors import MIB, equal, on_host, tensors
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.usefixtures("tried_out", "no_digests", "scaled_down", "little_may_be_locked"),
]

SIZES = [2 * MIB, 1000, 3 * MIB, 300_000, 500_000, 7, 9 * MIB]
ALLOWED = 6 * MIB  # what the driver locks in all
IN_RING = 4 * MIB  # of it: one registration in `scaled_down`


@pytest.fixture
def little_may_be_locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A ring of four slots of 1 MiB, and a driver that locks 6 MiB, as some containers do 500."""
    monkeypatch.setattr(ring, "SLOT", MIB)
    simcuda.set_pinned_limit(simcuda.host_counters().pinned + ALLOWED)
    yield
    simcuda.set_pinned_limit(None)


def all_asynchronous(seen: list[simcuda.CopyNotice]) -> bool:
    return bool(seen) and all(notice.pinned and notice.non_blocking for notice in seen)


@pytest.mark.parametrize("stream", [False, True])
def test_every_byte_crosses_the_link_from_and_to_locked_memory(gpu: GPU, stream: bool) -> None:
    model = tensors(*SIZES)
    expected = on_host(model)
    for act, direction in (
        (qmove.park, "d2h"),
        (lambda model: qmove.restore(model, stream=stream), "h2d"),
    ):
        with copies() as seen:
            act(model)
        assert equal(model, expected)
        assert all_asynchronous(seen) and {notice.direction for notice in seen} == {direction}
        # Small ones that travel together bring the gaps between them along.
        assert sum(SIZES) <= sum(notice.nbytes for notice in seen) < sum(SIZES) + 64 * len(SIZES)
        assert simcuda.host_counters().pinned_peak <= ALLOWED
    assert simcuda.last_error() == 0


@pytest.mark.parametrize("limit", ["setting", "driver"])
def test_the_ring_is_there_for_a_move_only_and_the_block_gives_up_what_it_needs(
    gpu: GPU, limit: str
) -> None:
    if limit == "setting":
        qmove.configure(pin_limit=ALLOWED)
        simcuda.set_pinned_limit(None)
    model = tensors(*SIZES)
    expected = on_host(model)
    parked = qmove.park(model)
    assert simcuda.host_counters().registered == 0, "a registration of 4 MiB made way"
    simcuda.reset_counters()
    parked.restore()
    assert simcuda.host_counters().pinned_peak == IN_RING
    assert equal(model, expected)
    assert simcuda.host_counters().registered == 0


def test_a_park_queues_the_next_copies_while_a_slot_is_emptied(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = devices.own_stream(gpu.device, "out")
    queued, copy = [], pages.copy

    def watched(target: torch.Tensor, source: torch.Tensor) -> None:
        queued.append(simcuda.queued(out))
        copy(target, source)

    monkeypatch.setattr(pages, "copy", watched)
    model = tensors(12 * MIB)
    expected = on_host(model)
    qmove.park(model)
    assert equal(model, expected)
    # (The first registration of 4 MiB was copied to directly, before it made way.)
    assert len(queued) == 8 and min(queued[:-3]) > 0, "the link was idle meanwhile"


def test_a_restore_fills_a_slot_while_others_are_on_the_link(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tensors(12 * MIB)
    expected = on_host(model)
    qmove.park(model)
    into = devices.own_stream(gpu.device, "in")
    queued, copy = [], pages.copy

    def watched(target: torch.Tensor, source: torch.Tensor) -> None:
        queued.append(simcuda.queued(into))
        copy(target, source)

    monkeypatch.setattr(pages, "copy", watched)
    qmove.restore(model)
    assert equal(model, expected)
    assert len(queued) == 12 and min(queued[1:]) > 0, "each copy was waited for"


def test_small_storages_cross_together(gpu: GPU) -> None:
    simcuda.set_pinned_limit(simcuda.host_counters().pinned + MIB)
    model = layers(40)  # 80 storages of 0.67 MB in all
    big = tensors(3 * MIB)
    before, size = snapshot(model), arena.bytes_for([16384, 256] * 40)
    with copies() as seen:
        qmove.park([model, big])
    assert all_asynchronous(seen) and len(seen) < 40
    assert sum(notice.nbytes for notice in seen) == size + 3 * MIB
    qmove.restore([model, big])
    assert snapshot(model) == before


def test_where_even_a_ring_is_too_much_it_is_smaller(gpu: GPU) -> None:
    simcuda.set_pinned_limit(simcuda.host_counters().pinned + MIB + 4096)
    model = tensors(*SIZES)
    expected = on_host(model)
    with copies() as seen:
        qmove.park(model).restore()
    assert equal(model, expected)
    assert all_asynchronous(seen) and max(notice.nbytes for notice in seen) == MIB // 4


def test_where_nothing_may_be_locked_all_is_pageable(gpu: GPU) -> None:
    simcuda.set_pinned_limit(simcuda.host_counters().pinned)
    model = tensors(*SIZES)
    expected = on_host(model)
    with copies() as seen:
        qmove.park(model).restore()
    assert equal(model, expected)
    assert not any(notice.pinned for notice in seen) and simcuda.last_error() == 0


def test_spares_make_way_for_the_ring(gpu: GPU) -> None:
    other = tensors(4 * MIB)
    qmove.park(other).restore()
    assert arena.spare_bytes() == pinned_bytes() == 4 * MIB
    model = tensors(9 * MIB)
    expected = on_host(model)
    with copies() as seen:
        qmove.park(model)
    assert equal(model, expected) and all_asynchronous(seen)


def pinned_bytes() -> int:
    return qmove.stats().pinned_bytes


def test_a_model_on_the_host_that_was_never_parked_comes_through_the_ring(gpu: GPU) -> None:
    model = [torch.arange(5 * MIB // 4, dtype=torch.float32)]
    before = model[0].clone()
    with copies() as seen:
        qmove.move(model, gpu.device)
    assert all_asynchronous(seen) and [notice.nbytes for notice in seen] == [MIB] * 5
    assert torch.equal(model[0].cpu(), before)


def test_what_its_owner_has_pinned_needs_no_ring(gpu: GPU) -> None:
    model = [torch.zeros(2 * MIB, dtype=torch.uint8).pin_memory()]
    with copies() as seen:
        qmove.move(model, gpu.device)
    assert [(notice.pinned, notice.nbytes) for notice in seen] == [(True, 2 * MIB)]


@pytest.mark.parametrize("nth", [1, 3, 6, 12])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_copy_that_fails_leaves_the_model_and_locks_nothing(
    gpu: GPU, nth: int, late: bool, error: type[BaseException] | None
) -> None:
    model = tensors(*SIZES)
    expected = on_host(model)
    for act, parked in ((qmove.park, False), (qmove.restore, True)):
        with (
            simcuda.fail("copy", nth=nth, late=late, error=error) as fault,
            pytest.raises(error or torch.AcceleratorError),
        ):
            act(model)
        assert fault.fired == 1 and qmove.is_parked(model) is parked
        assert equal(model, expected)
        act(model)
    assert equal(model, expected)
    qmove.trim()
    assert simcuda.host_counters().registered == 0


@pytest.mark.parametrize("seed", range(6))
def test_random_moves_give_what_twins_have_that_never_moved(gpu: GPU, seed: int) -> None:
    """Two models of random sizes under random limits, with writes in between."""
    chance = random.Random(seed)
    pair = [
        tensors(*(chance.choice([7, 1000, 300_000, MIB, 2 * MIB + 5]) for _ in range(6)))
        for _ in range(2)
    ]
    twins = [on_host(model) for model in pair]
    qmove.configure(keep_mirrors=bool(seed % 2))
    base = simcuda.host_counters().pinned
    for _ in range(25):
        model, twin = chance.choice(list(zip(pair, twins, strict=True)))
        simcuda.set_pinned_limit(base + chance.choice([0, MIB, 2 * MIB, ALLOWED, 1 << 40]))
        act = chance.choice(["park", "restore", "stream", "swap", "write", "trim"])
        if act == "park":
            qmove.park(model)
        elif act == "restore":
            qmove.restore(model)
        elif act == "stream":
            qmove.restore(model, stream=True)
        elif act == "swap":
            qmove.swap(*chance.sample(pair, 2))
        elif act == "write":
            index = chance.randrange(len(model))
            for each in (model[index].data, twin[index]):
                each.view(torch.uint8)[-1] ^= 0x5A
        else:
            qmove.trim()
        assert all(equal(some, others) for some, others in zip(pair, twins, strict=True))
    assert blocks.file_bytes() == 0
