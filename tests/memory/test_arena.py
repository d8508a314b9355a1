"""The arena: host memory in blocks, sized exactly, and blocks that are kept to be used again."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import homes
from qmove_core.memory import arena, blocks, giving_back, pinning, unlocking
from qmove_core.storages import as_bytes
from tests.builders.arena import MIB, block_of, is_mapped, nothing, operator_works, pinned_storage

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]


ROOT = Path(__file__).parents[2]


class TestStorages:
    def test_lie_one_after_another_in_one_block(self) -> None:
        sizes = [100, 0, 64, 5000]
        storages = arena.allocate(sizes, nothing)
        block = block_of(storages[0])
        places = [blocks.place_of(storage) for storage in storages]
        assert places == [(block, 0), (block, 128), (block, 128), (block, 192)]
        assert [storage.nbytes() for storage in storages] == sizes
        assert storages[3].data_ptr() == block.address + 192
        assert block.nbytes == arena.bytes_for(sizes) == arena.bytes_in_use() == 192 + 5056

    def test_a_foreign_storage_has_no_place(self) -> None:
        assert blocks.place_of(torch.ones(3).untyped_storage()) is None

    def test_a_stale_place_is_no_place(self) -> None:
        (storage,) = arena.allocate([64], nothing)
        foreign = torch.ones(64, dtype=torch.uint8).untyped_storage()
        blocks._places[foreign._cdata] = blocks._places[
            storage._cdata
        ]  # a Ctrl-C ended a finalizer, the id came again
        assert blocks.place_of(foreign) is None
        del blocks._places[foreign._cdata]

    def test_none_and_empty_ones(self) -> None:
        assert arena.allocate([], nothing) == []
        (empty,) = arena.allocate([0], nothing)
        assert (
            empty.nbytes() == 0
            and block_of(empty).as_bytes().numel() == 0
            and block_of(empty).pin(0, 0)
        )

    def test_the_block_is_seen_as_one_tensor_that_keeps_it(self) -> None:
        first, second = arena.allocate([64, 64], nothing)
        whole = block_of(first).as_bytes()
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
        assert dead == [number] and number not in blocks._places
        assert arena.bytes_in_use() == 128, "the other one still needs the block"
        del second
        assert len(dead) == 2 and not blocks._places


class TestSpares:
    def test_a_pinned_block_is_reused_and_pinned_once(self) -> None:
        storage, block = pinned_storage(3 * MIB)
        del storage
        assert (arena.bytes_in_use(), arena.spare_bytes(), pinning.registered_bytes()) == (
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
        unlocking.wait()
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
        assert (simcuda.host_counters().registered, pinning.registered_bytes(), arena.trim()) == (
            0,
            0,
            0,
        )

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
        map_memory = blocks.map_memory

        def refuses_while_there_are_spares(nbytes: int) -> Any:
            if arena.spare_bytes():
                raise OSError("no memory")
            return map_memory(nbytes)

        monkeypatch.setattr(blocks, "map_memory", refuses_while_there_are_spares)
        (_storage,) = arena.allocate([MIB], nothing)
        assert arena.spare_bytes() == 0 and arena.bytes_in_use() == MIB

    def test_idle_spares_go_back(self) -> None:
        storage, block = pinned_storage(MIB)
        del storage
        assert arena.give_back_idle() == arena.give_back_idle(idle_seconds=3600) == 0
        block.idle_since -= arena.IDLE_SECONDS
        assert arena.give_back_idle() == MIB
        assert simcuda.host_counters().registered == 0

    def test_idle_spares_go_back_by_themselves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given_back = threading.Event()
        watch = giving_back.Watch(idle_seconds=0.01)
        release = blocks.Block.release

        def release_and_tell(block: blocks.Block, *options: Callable[[], bool]) -> None:
            release(block, *options)
            given_back.set()

        monkeypatch.setattr(blocks.Block, "release", release_and_tell)
        storage, block = pinned_storage(MIB)
        watch.start()
        assert not given_back.is_set(), "a block in use is not idle"
        del storage, block
        assert given_back.wait(60) and simcuda.host_counters().registered == 0
        watch.end()

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
            blocks.never_unmapped.clear()


class TestProcesses:
    @pytest.mark.parametrize(
        "body",
        [
            "",
            "arena.prepare(40 * blocks.PIECE)",
            "import threading; arena._preparers.append(threading.Thread())",
            "arena.prepare(blocks.PIECE); [thread.join() for thread in arena._preparers]",
            "del storage",
            "import weakref; keep.append(keep)",
        ],
        ids=["parked", "preparing", "about to prepare", "prepared", "spare", "in a cycle"],
    )
    def test_end_without_a_word(self, body: str) -> None:
        script = f"""
            import simcuda; simcuda.activate(devices=1, memory="1GiB")
            import torch
            from qmove_core.memory import arena, blocks
            (storage,) = arena.allocate([3 << 20], lambda cdata: None)
            keep = [storage]
            block = blocks.place_of(storage)[0]
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
        assert pinning.registered_bytes() == simcuda.host_counters().registered == 3 * MIB


def _in_child(storage: torch.UntypedStorage) -> None:
    assert arena.spare_bytes() == pinning.registered_bytes() == 0
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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_is_forked_while_another_thread_moves_waits_for_nobody() -> None:
    held, forked = threading.Event(), threading.Event()

    def move() -> None:
        with homes.lock:
            held.set()
            forked.wait(60)

    mover = threading.Thread(target=move)
    mover.start()
    assert held.wait(60)
    child = os.fork()
    if child == 0:
        os._exit(0 if homes.lock.acquire(timeout=20) and qmove.trim() == 0 else 1)
    forked.set()
    mover.join(60)
    assert os.waitpid(child, 0)[1] == 0
    assert homes.lock.acquire(blocking=False), "the parent's is its own"
    homes.lock.release()
