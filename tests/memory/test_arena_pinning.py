"""The arena: blocks are pinned piece by piece, in the background too, and go on pageable where
pinning is refused."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, blocks, pages, pinning, unlocking
from qmove_core.memory.blocks import PIECE
from qmove_core.memory.pages import PAGE
from qmove_core.storages import as_bytes
from tests.builders.arena import (
    MIB,
    block_of,
    nothing,
    operator_works,
    pinned_storage,
    wait_until_prepared,
)
from tests.builders.interrupts import ctrl_c_at_line

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]


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


class TestPinning:
    def test_is_exact_to_the_page(self) -> None:
        nbytes = 3 * MIB + 100  # an allocator that rounds up to powers of two would take 4 MiB
        storage, _block = pinned_storage(nbytes)
        pages = -(-nbytes // PAGE) * PAGE
        assert (
            simcuda.host_counters().registered
            == simcuda.host_counters().pinned
            == pages
            == pinning.registered_bytes()
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
            block.as_bytes()[PIECE:].copy_(source, non_blocking=True)
            torch.cuda.synchronize()
        assert torch.equal(as_bytes(storage)[PIECE:], source.cpu())

    def test_an_interrupt_in_the_driver_leaves_nothing_locked_that_is_not_known(self) -> None:
        (storage,) = arena.allocate([PIECE + MIB], nothing)
        block = block_of(storage)
        with simcuda.fail("pin", nth=2, error=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            block.pin(0, block.nbytes)
        assert (
            pinning.registered_bytes() == block.pinned_bytes == simcuda.host_counters().registered
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
            unlocking.wait()  # Ctrl-C ended the wait for it, not what is under way
            assert pinning.registered_bytes() == simcuda.host_counters().registered, number
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
        with (
            simcuda.fail("pin", nth=2, times=9) as fault,
            caplog.at_level(logging.WARNING, "qmove"),
        ):
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
        assert pinning.registered_bytes() == PIECE
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


class TestPreparing:
    def test_the_next_park_finds_everything_pinned(self) -> None:
        arena.prepare(2 * PIECE + MIB)
        wait_until_prepared()
        assert arena.spare_bytes() == pinning.registered_bytes() == 2 * PIECE + MIB
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
        wait_until_prepared()
        assert results == [True] and sorted(gate.addresses) == [
            block.address + i * PIECE for i in range(3)
        ]
        assert simcuda.host_counters().pins == 3

    def test_a_block_that_is_still_being_pinned_is_given_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate = Gate(monkeypatch, at=2)
        told_to_stop = threading.Event()
        stop_pinning = blocks.Block.stop_pinning

        def stop_and_tell(block: blocks.Block) -> None:
            stop_pinning(block)
            told_to_stop.set()

        monkeypatch.setattr(blocks.Block, "stop_pinning", stop_and_tell)
        arena.prepare(3 * PIECE)
        assert gate.reached.wait(60)
        trimmer = threading.Thread(target=arena.trim)
        trimmer.start()
        assert told_to_stop.wait(60)
        gate.opened.set()
        trimmer.join(60)
        wait_until_prepared()
        assert (
            arena.spare_bytes()
            == pinning.registered_bytes()
            == simcuda.host_counters().registered
            == 0
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
        wait_until_prepared()
        assert pinning.registered_bytes() == PIECE

    def test_a_spare_that_fits_is_enough(self) -> None:
        storage, block = pinned_storage(MIB)
        del storage, block
        arena.prepare(MIB)
        wait_until_prepared()
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
            wait_until_prepared()
        assert arena.spare_bytes() == pinning.registered_bytes() == 0 and not arena._blocks

    def test_a_refusal_in_the_background_leaves_pageable_memory(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with simcuda.fail("pin", nth=2):
            arena.prepare(2 * PIECE)
            wait_until_prepared()
        assert pinning.registered_bytes() == PIECE and arena.spare_bytes() == 2 * PIECE
        assert len(caplog.records) == 1 and operator_works()
