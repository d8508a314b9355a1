"""The arena: host memory that is pinned piece by piece, sized exactly, reused, and given back."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, pages, pinning
from qmove_core.memory.arena import PIECE
from qmove_core.memory.pages import PAGE
from qmove_core.storages import as_bytes
from tests.guarantees.test_atomic import ctrl_c_at_line

pytestmark = pytest.mark.simulated

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def empty_arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts and ends with an arena that holds nothing, and a log that has said nothing."""
    monkeypatch.setattr(pinning, "_said", set())
    monkeypatch.setattr(arena, "_most_held", 0)
    arena.trim()
    gc.collect()
    simcuda.reset_counters()
    assert (arena.bytes_in_use(), arena.spare_bytes(), arena.pinned_bytes()) == (0, 0, 0)
    yield
    simcuda.set_pinned_limit(None)
    arena.wait_until_prepared()
    gc.collect()
    arena.trim()
    assert simcuda.host_counters().registered == 0, "something stayed page-locked"


def nothing(_cdata: int) -> None:
    """For storages whose death nobody waits for."""


def pinned_storage(nbytes: int) -> tuple[torch.UntypedStorage, arena.Block]:
    """One storage in a block of its own, all of it pinned."""
    (storage,) = arena.allocate([nbytes], nothing)
    block = block_of(storage)
    assert block.pin(0, block.nbytes)
    return storage, block


def block_of(storage: torch.UntypedStorage) -> arena.Block:
    place = arena.place_of(storage)
    assert place is not None
    return place[0]


def is_mapped(address: int) -> bool:
    """Whether this process has memory there; from the kernel's own list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def operator_works() -> bool:
    return simcuda.last_error() == 0 and torch.ones(3, device="cuda").sum().item() == 3


class Gate:
    """Stops registrations at the n-th until it is opened, and tells when that one is reached."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.addresses: list[int] = []
        register = pinning.register

        def gated(address: int, nbytes: int) -> bool:
            self.addresses.append(address)
            if len(self.addresses) == at:
                self.reached.set()
                assert self.opened.wait(60)
            return register(address, nbytes)

        monkeypatch.setattr(pinning, "register", gated)


class TestStorages:
    def test_lie_one_after_another_in_one_block(self) -> None:
        sizes = [100, 0, 64, 5000]
        storages = arena.allocate(sizes, nothing)
        block = block_of(storages[0])
        places = [arena.place_of(storage) for storage in storages]
        assert places == [(block, 0), (block, 128), (block, 128), (block, 192)]
        assert [storage.nbytes() for storage in storages] == sizes
        assert storages[3].data_ptr() == block.address + 192
        assert block.nbytes == arena.bytes_for(sizes) == arena.bytes_in_use() == 192 + 5056

    def test_a_foreign_storage_has_no_place(self) -> None:
        assert arena.place_of(torch.ones(3).untyped_storage()) is None

    def test_a_stale_place_is_no_place(self) -> None:
        (storage,) = arena.allocate([64], nothing)
        foreign = torch.ones(64, dtype=torch.uint8).untyped_storage()
        arena._places[foreign._cdata] = arena._places[
            storage._cdata
        ]  # a Ctrl-C ended a finalizer, the id came again
        assert arena.place_of(foreign) is None
        del arena._places[foreign._cdata]

    def test_none_and_empty_ones(self) -> None:
        assert arena.allocate([], nothing) == []
        (empty,) = arena.allocate([0], nothing)
        assert (
            empty.nbytes() == 0
            and block_of(empty).bytes().numel() == 0
            and block_of(empty).pin(0, 0)
        )

    def test_the_block_is_seen_as_one_tensor_that_keeps_it(self) -> None:
        first, second = arena.allocate([64, 64], nothing)
        whole = block_of(first).bytes()
        as_bytes(second).fill_(7)
        assert whole.tolist() == as_bytes(first).tolist() + [7] * 64
        del first, second
        assert arena.bytes_in_use() == 128
        del whole
        assert arena.bytes_in_use() == 0

    def test_each_death_is_told_and_forgotten(self) -> None:
        dead: list[int] = []
        first, second = arena.allocate([64, 64], dead.append)
        number = first._cdata
        del first
        assert dead == [number] and number not in arena._places
        assert arena.bytes_in_use() == 128, "the other one still needs the block"
        del second
        assert len(dead) == 2 and not arena._places


class TestPinning:
    def test_is_exact_to_the_page(self) -> None:
        nbytes = 3 * MIB + 100  # an allocator that rounds up to powers of two would take 4 MiB
        storage, _block = pinned_storage(nbytes)
        pages = -(-nbytes // PAGE) * PAGE
        assert (
            simcuda.host_counters().registered
            == simcuda.host_counters().pinned
            == pages
            == arena.pinned_bytes()
        )
        assert as_bytes(storage).is_pinned()

    def test_goes_by_pieces_and_only_those_that_are_touched(self) -> None:
        (storage,) = arena.allocate([2 * PIECE + MIB], nothing)
        block = block_of(storage)
        assert simcuda.host_counters().pins == 0, "allocating pins nothing"
        assert block.pin(PIECE - 1, PIECE)
        assert (simcuda.host_counters().pins, block.pinned_bytes) == (1, PIECE)
        assert block.pin(PIECE, 2 * PIECE + 1)
        assert (simcuda.host_counters().pins, block.pinned_bytes) == (3, 2 * PIECE + MIB)
        assert block.pin(0, block.nbytes) and simcuda.host_counters().pins == 3, (
            "what is pinned is not pinned again"
        )

    def test_pages_are_touched_before_they_are_registered(self) -> None:
        simcuda.clock.reset()
        _storage, block = pinned_storage(8 * MIB)
        link = simcuda.link.current()
        assert simcuda.clock.now() == pytest.approx(block.nbytes / link.pin_touched)

    def test_keeps_what_is_in_the_memory(self) -> None:
        (storage,) = arena.allocate([3 * PAGE], nothing)
        as_bytes(storage).fill_(7)
        assert block_of(storage).pin(0, 3 * PAGE)
        assert bool((as_bytes(storage) == 7).all())

    def test_copies_within_a_piece_are_asynchronous_and_right(self) -> None:
        storage, block = pinned_storage(PIECE + MIB)
        source = torch.arange(MIB, device="cuda").to(torch.uint8)
        with simcuda.strict_host_frees():
            block.bytes()[PIECE:].copy_(source, non_blocking=True)
            torch.cuda.synchronize()
        assert torch.equal(as_bytes(storage)[PIECE:], source.cpu())

    def test_an_interrupt_in_the_driver_leaves_nothing_locked_that_is_not_known(self) -> None:
        (storage,) = arena.allocate([PIECE + MIB], nothing)
        block = block_of(storage)
        with simcuda.fail("pin", nth=2, error=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            block.pin(0, block.nbytes)
        assert (
            arena.pinned_bytes()
            == block.pinned_bytes
            == simcuda.host_counters().registered
            == PIECE
        )
        assert block.pin(0, block.nbytes)

    @pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    )  # of a Ctrl-C in a finalizer
    def test_ctrl_c_at_any_line_loses_nothing(self) -> None:
        number, finished = 0, False
        while not finished:
            number += 1
            storages: list[torch.UntypedStorage] = []
            try:
                with ctrl_c_at_line(number) as lines:
                    storages += arena.allocate([MIB, PAGE], nothing)
                    block_of(storages[0]).pin(0, MIB)
                    storages.clear()
                    arena.trim()
                    finished = lines() < number
            except KeyboardInterrupt:
                storages.clear()
            assert arena.bytes_in_use() == 0, number
            assert arena.pinned_bytes() == simcuda.host_counters().registered, number
            arena.trim()
            assert simcuda.host_counters().registered == 0, number
        assert number > 50, "it did go through the lines"

    @pytest.mark.parametrize("populates", [True, False])
    def test_touching_makes_pages_and_writes_nothing(
        self, populates: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if not populates:
            monkeypatch.setattr(pages, "_madvise", lambda: None)
        (storage,) = arena.allocate([4 * PAGE], nothing)
        as_bytes(storage)[PAGE : 2 * PAGE].fill_(9)
        pages.touch(as_bytes(storage).numpy())
        assert as_bytes(storage).sum() == 9 * PAGE


class TestRefusals:
    def test_the_driver_refuses(self, caplog: pytest.LogCaptureFixture) -> None:
        (storage,) = arena.allocate([3 * PIECE], nothing)
        block = block_of(storage)
        with simcuda.fail("pin", nth=2, times=9) as fault, caplog.at_level(logging.INFO, "qmove"):
            assert not block.pin(0, block.nbytes)
            assert simcuda.last_error() == 0, (
                "the error would be raised by somebody's next operator"
            )
            assert operator_works()
            assert not block.pin(2 * PIECE, 3 * PIECE)
            assert fault.fired == 1, "it was asked again"
        assert block.pinned_bytes == PIECE and block.pin(0, PIECE), "what was pinned stays pinned"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        for word in (
            "out of memory",
            "pageable",
            "several times as long",
            "qmove.configure(pin_limit=",
        ):
            assert word in record.getMessage()
        as_bytes(storage).fill_(1)  # it is memory like any other

    def test_what_the_driver_allows_is_used_up_and_the_next_block_asks_again(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        simcuda.set_pinned_limit(simcuda.host_counters().pinned + MIB)
        with caplog.at_level(logging.INFO, "qmove"):
            _first, _ = pinned_storage(MIB)
            (second,) = arena.allocate([MIB], nothing)
            assert not block_of(second).pin(0, MIB)
            simcuda.set_pinned_limit(None)
            (third,) = arena.allocate([MIB], nothing)
            assert block_of(third).pin(0, MIB)
        assert len(caplog.records) == 1
        assert operator_works()

    def test_the_memlock_limit_is_named_and_not_obeyed(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pinning, "memlock_limit", lambda: 64 * 1024)
        _first, _ = pinned_storage(MIB)
        (second,) = arena.allocate([MIB], nothing)
        with simcuda.fail("pin"):
            assert not block_of(second).pin(0, MIB)
        assert "`ulimit -l` is 64.00 KiB" in caplog.text

    def test_one_line_for_each_reason(self, caplog: pytest.LogCaptureFixture) -> None:
        for _ in range(3):
            (storage,) = arena.allocate([MIB], nothing)
            with simcuda.fail("pin"):
                assert not block_of(storage).pin(0, MIB)
        assert len(caplog.records) == 1

    def test_beyond_the_limit_nobody_is_asked(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            pinning, "pin_limit", lambda: pinning.PinLimit(PIECE, "a test's limit", "Do this.")
        )
        (storage,) = arena.allocate([2 * PIECE], nothing)
        block = block_of(storage)
        with simcuda.fail("pin", nth=2, error=AssertionError("the driver was asked")):
            assert not block.pin(0, block.nbytes)
        assert arena.pinned_bytes() == PIECE
        (record,) = caplog.records
        assert "64.00 MiB (a test's limit)" in record.getMessage() and record.getMessage().endswith(
            "Do this."
        )

    def test_a_pin_limit_of_0_pins_nothing_and_says_nothing(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        qmove.configure(pin_limit=0)
        try:
            (storage,) = arena.allocate([MIB], nothing)
            assert not block_of(storage).pin(0, MIB)
            arena.prepare(MIB)
        finally:
            qmove.configure(pin_limit=None)
        assert simcuda.host_counters().pins == 0 and arena.spare_bytes() == 0
        assert not caplog.records

    def test_other_accelerators_stay_pageable_with_no_warning(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
        with caplog.at_level(logging.INFO, "qmove"):
            (storage,) = arena.allocate([MIB], nothing)
            assert not block_of(storage).pin(0, MIB)
            assert not block_of(storage).pin(0, MIB)
        assert simcuda.host_counters().pins == 0
        assert [record.levelno for record in caplog.records] == [logging.INFO]


class TestSpares:
    def test_a_pinned_block_is_reused_and_pinned_once(self) -> None:
        storage, block = pinned_storage(3 * MIB)
        del storage
        assert (arena.bytes_in_use(), arena.spare_bytes(), arena.pinned_bytes()) == (
            0,
            3 * MIB,
            3 * MIB,
        )
        again, the_same = pinned_storage(3 * MIB)
        assert the_same is block
        assert simcuda.host_counters().pins == 1
        assert (arena.bytes_in_use(), arena.spare_bytes()) == (3 * MIB, 0)
        del again

    def test_what_was_never_pinned_goes_back_at_once(self) -> None:
        (storage,) = arena.allocate([3 * MIB], nothing)
        address = block_of(storage).address
        assert is_mapped(address)
        del storage
        assert not is_mapped(address) and arena.spare_bytes() == 0

    def test_ten_swaps_of_two_models_pin_each_once(self) -> None:
        sizes = [3 * MIB, 5 * MIB]
        parked, _ = pinned_storage(sizes[0])
        for turn in range(1, 10):
            other, _ = pinned_storage(sizes[turn % 2])
            parked = other
            del other
        assert simcuda.host_counters().pins == 2
        del parked

    def test_the_best_fit_is_taken(self) -> None:
        stores = [pinned_storage(nbytes) for nbytes in (10 * MIB, 8 * MIB, 9 * MIB)]
        addresses = [block.address for _storage, block in stores]
        stores.clear()
        storage, _ = pinned_storage(8 * MIB - 64)
        assert storage.data_ptr() == addresses[1]

    def test_a_spare_is_not_wasted_on_less_than_three_quarters(self) -> None:
        storage, block = pinned_storage(8 * MIB)
        address = block.address
        del storage, block
        (small,) = arena.allocate([6 * MIB - 64], nothing)
        assert small.data_ptr() != address
        (enough,) = arena.allocate([6 * MIB], nothing)
        assert enough.data_ptr() == address or arena.spare_bytes() == 0

    def test_what_a_spare_would_serve_is_said(self) -> None:
        storage, block = pinned_storage(8 * MIB)
        del storage, block
        assert [
            arena.spare_for(nbytes) for nbytes in (6 * MIB - 1, 6 * MIB, 8 * MIB, 8 * MIB + 1)
        ] == [
            0,
            8 * MIB,
            8 * MIB,
            0,
        ]

    def test_more_than_ever_needed_at_once_is_not_held(self) -> None:
        storage, block = pinned_storage(8 * MIB)
        del storage, block
        (small,) = arena.allocate([3 * MIB], nothing)
        assert arena.spare_bytes() == 0, "8 MiB is the most that was needed, and 3 + 8 is more"
        assert simcuda.host_counters().registered == 0
        del small

    def test_trim_gives_the_longest_idle_back_first(self) -> None:
        stores = {nbytes: pinned_storage(nbytes) for nbytes in (4 * MIB, 2 * MIB, MIB)}
        addresses = {nbytes: block.address for nbytes, (_storage, block) in stores.items()}
        for nbytes in (2 * MIB, MIB, 4 * MIB):
            del stores[nbytes]
        assert arena.spare_bytes() == 7 * MIB
        assert arena.trim(keep=5 * MIB) == 2 * MIB
        assert not is_mapped(addresses[2 * MIB])
        assert simcuda.host_counters().registered == arena.spare_bytes() == 5 * MIB
        assert arena.trim() == 5 * MIB
        assert not any(is_mapped(address) for address in addresses.values())
        assert (simcuda.host_counters().registered, arena.pinned_bytes(), arena.trim()) == (0, 0, 0)

    def test_ram_limit_counts_spares(self) -> None:
        keep, _ = pinned_storage(8 * MIB)
        storage, block = pinned_storage(4 * MIB)
        del storage, block
        qmove.configure(ram_limit=14 * MIB)
        try:
            (third,) = arena.allocate([3 * MIB - 64], nothing)
            assert arena.bytes_in_use() + arena.spare_bytes() <= 14 * MIB
        finally:
            qmove.configure(ram_limit=None)
        del keep, third

    def test_pinned_spares_make_way_for_a_block_that_could_not_be_pinned_beside_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, second = pinned_storage(8 * MIB), pinned_storage(8 * MIB)
        del first, second
        monkeypatch.setattr(
            pinning, "pin_limit", lambda: pinning.PinLimit(16 * MIB, "a test's limit", "")
        )
        (third,) = arena.allocate([5 * MIB], nothing)
        assert block_of(third).pin(0, 5 * MIB)
        assert arena.spare_bytes() == 8 * MIB

    def test_a_refusal_of_the_system_takes_the_spares_first(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage, block = pinned_storage(8 * MIB)
        del storage, block
        monkeypatch.setattr(arena, "_most_held", 1 << 40)
        map_memory = arena.map_memory

        def refuses_while_there_are_spares(nbytes: int) -> Any:
            if arena.spare_bytes():
                raise OSError("no memory")
            return map_memory(nbytes)

        monkeypatch.setattr(arena, "map_memory", refuses_while_there_are_spares)
        (_storage,) = arena.allocate([MIB], nothing)
        assert arena.spare_bytes() == 0 and arena.bytes_in_use() == MIB

    def test_idle_spares_go_back(self) -> None:
        storage, block = pinned_storage(MIB)
        del storage
        assert arena.give_back_idle(block.idle_since + arena.IDLE_SECONDS - 1) == 0
        assert arena.give_back_idle(block.idle_since + arena.IDLE_SECONDS) == MIB
        assert simcuda.host_counters().registered == 0

    def test_idle_spares_go_back_by_themselves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ending, given_back = threading.Event(), threading.Event()
        monkeypatch.setattr(arena, "IDLE_SECONDS", 0.01)
        monkeypatch.setattr(arena, "_ending", ending)
        monkeypatch.setattr(arena, "_idle_watch", None)  # the process's own waits for longer
        release = arena.Block.release

        def release_and_tell(block: arena.Block) -> None:
            release(block)
            given_back.set()

        monkeypatch.setattr(arena.Block, "release", release_and_tell)
        storage, block = pinned_storage(MIB)
        watch = arena._idle_watch
        assert watch is not None and not given_back.is_set(), "a block in use is not idle"
        del storage, block
        assert given_back.wait(60) and simcuda.host_counters().registered == 0
        ending.set()
        watch.join(60)

    def test_a_storage_that_dies_while_the_arena_is_locked_waits_for_nobody(self) -> None:
        storage, _ = pinned_storage(MIB)
        holder = [storage]
        del storage
        with arena._lock, pinning._lock:
            killer = threading.Thread(target=holder.clear)
            killer.start()
            killer.join(60)
            assert not killer.is_alive(), "the finalizer waits for a lock"
            assert arena.bytes_in_use() == 0 and arena.spare_bytes() == MIB

    def test_a_block_that_cannot_be_unlocked_is_never_unmapped(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage, block = pinned_storage(MIB)
        address = block.address
        runtime = torch.cuda.cudart()
        assert runtime.cudaHostUnregister(address) == 0  # somebody else did: the driver now refuses
        del storage, block
        try:
            arena.trim()
            assert is_mapped(address)
            assert "could not be unlocked" in caplog.text and operator_works()
        finally:
            arena._never_unmapped.clear()


class TestPreparing:
    def test_the_next_park_finds_everything_pinned(self) -> None:
        arena.prepare(2 * PIECE + MIB)
        arena.wait_until_prepared()
        assert arena.spare_bytes() == arena.pinned_bytes() == 2 * PIECE + MIB
        pins = simcuda.host_counters().pins
        storage, _block = pinned_storage(2 * PIECE + MIB)
        assert simcuda.host_counters().pins == pins == 3
        del storage

    def test_a_block_that_is_still_being_pinned_is_taken(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = Gate(monkeypatch, at=2)
        arena.prepare(3 * PIECE)
        assert gate.reached.wait(60)
        (storage,) = arena.allocate([3 * PIECE], nothing)
        block = block_of(storage)
        assert arena.spare_bytes() == 0 and block.pinned_bytes == PIECE
        assert block.pin(0, PIECE), "this one is done"
        assert block.pin(2 * PIECE, 3 * PIECE), "nobody is at this one"
        assert not gate.opened.is_set()
        results: list[bool] = []
        waiting = threading.Thread(target=lambda: results.append(block.pin(PIECE, 2 * PIECE)))
        waiting.start()
        gate.opened.set()
        waiting.join(60)
        arena.wait_until_prepared()
        assert results == [True] and sorted(gate.addresses) == [
            block.address + i * PIECE for i in range(3)
        ]
        assert simcuda.host_counters().pins == 3

    def test_a_block_that_is_still_being_pinned_is_given_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = Gate(monkeypatch, at=2)
        told_to_stop = threading.Event()
        stop_pinning = arena.Block.stop_pinning

        def stop_and_tell(block: arena.Block) -> None:
            stop_pinning(block)
            told_to_stop.set()

        monkeypatch.setattr(arena.Block, "stop_pinning", stop_and_tell)
        arena.prepare(3 * PIECE)
        assert gate.reached.wait(60)
        trimmer = threading.Thread(target=arena.trim)
        trimmer.start()
        assert told_to_stop.wait(60)
        gate.opened.set()
        trimmer.join(60)
        arena.wait_until_prepared()
        assert (
            arena.spare_bytes() == arena.pinned_bytes() == simcuda.host_counters().registered == 0
        )
        assert len(gate.addresses) == 2, "it went on after it was told to stop"

    def test_a_block_whose_storages_die_while_it_is_being_pinned_stays_a_spare(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = Gate(monkeypatch, at=1)
        arena.prepare(PIECE)
        assert gate.reached.wait(60)
        (storage,) = arena.allocate([PIECE], nothing)
        del storage
        assert arena.spare_bytes() == PIECE
        gate.opened.set()
        arena.wait_until_prepared()
        assert arena.pinned_bytes() == PIECE

    def test_a_spare_that_fits_is_enough(self) -> None:
        storage, block = pinned_storage(MIB)
        del storage, block
        arena.prepare(MIB)
        arena.wait_until_prepared()
        assert arena.spare_bytes() == MIB and simcuda.host_counters().pins == 1

    def test_never_beyond_ram_limit(self) -> None:
        qmove.configure(ram_limit=MIB - 1)
        try:
            arena.prepare(MIB)
        finally:
            qmove.configure(ram_limit=None)
        assert arena.spare_bytes() == 0

    def test_what_cannot_be_pinned_at_all_is_not_kept(self) -> None:
        with simcuda.fail("pin"):
            arena.prepare(2 * PIECE)
            arena.wait_until_prepared()
        assert arena.spare_bytes() == arena.pinned_bytes() == 0 and not arena._blocks

    def test_a_refusal_in_the_background_leaves_pageable_memory(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with simcuda.fail("pin", nth=2):
            arena.prepare(2 * PIECE)
            arena.wait_until_prepared()
        assert arena.pinned_bytes() == PIECE and arena.spare_bytes() == 2 * PIECE
        assert len(caplog.records) == 1 and operator_works()


class TestProcesses:
    @pytest.mark.parametrize(
        "body",
        [
            "",
            "arena.prepare(40 * arena.PIECE)",
            "arena.prepare(arena.PIECE); arena.wait_until_prepared()",
            "del storage",
            "import weakref; keep.append(keep)",
        ],
        ids=["parked", "preparing", "prepared", "spare", "in a cycle"],
    )
    def test_end_without_a_word(self, body: str) -> None:
        script = f"""
            import simcuda; simcuda.activate(devices=1, memory="1GiB")
            import torch
            from qmove_core.memory import arena
            (storage,) = arena.allocate([3 << 20], lambda cdata: None)
            keep = [storage]
            block = arena.place_of(storage)[0]
            assert block.pin(0, block.nbytes)
            if "del" in {body!r}: keep.clear()
            {body}
        """
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
            cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "")
        assert "Error" not in done.stderr and "Traceback" not in done.stderr, done.stderr

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
    def test_a_forked_child_leaves_the_parents_pins_alone(self) -> None:
        storage, _block = pinned_storage(MIB)
        spare, _ = pinned_storage(2 * MIB)
        del spare
        as_bytes(storage).fill_(5)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            _report(write, lambda: _in_child(storage))
        os.close(write)
        with os.fdopen(read) as pipe:
            assert pipe.read() == "fine"
        assert os.waitpid(child, 0)[1] == 0
        assert bool((as_bytes(storage) == 5).all()), "the child wrote into the parent's memory"
        assert arena.pinned_bytes() == simcuda.host_counters().registered == 3 * MIB


def _in_child(storage: torch.UntypedStorage) -> None:
    assert arena.spare_bytes() == arena.pinned_bytes() == 0
    assert not block_of(storage).pin(0, MIB)
    assert bool((as_bytes(storage)[:3] == 5).all())
    storage[0] = 9
    calls: list[Any] = []
    pinning.unregister = calls.append  # type: ignore[assignment]
    del storage
    arena.trim()
    assert not calls


def _report(write: int, story: Callable[[], None]) -> None:
    """Tells the parent how it went and ends the child, without pytest's own endings."""
    try:
        story()
        os.write(write, b"fine")
    except BaseException as error:
        os.write(write, repr(error).encode())
    finally:
        os._exit(0)
