"""Every knob of the simulator shows a mistake in qmove that nothing shows without it.

`KNOBS` is the table: the knob, the mistake that is planted, and what of qmove no longer holds then.
Three tests go through it: it holds with the knob on; not with the mistake; and with the mistake, but
the knob off, nobody would know.

Elsewhere: `strict_host_frees`, which is about pinned tensors of PyTorch, that qmove has none of
(`test_streams.py`); the end of a process by cudaMallocAsync (`test_allocators.py`); `clock.compute`
beside a park (`transfer/test_other_streams.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import simcuda
from qmove_core import devices
from qmove_core.digests import choosing, digest
from qmove_core.memory import arena, blocks, budget, pinning, unlocking
from qmove_core.parking import streaming
from qmove_core.transfer import copies, transaction
from qmove_core.transfer.transaction import MoveTransaction
from tests.builders import knobs

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Knob:
    """One row.

    Attributes:
        name: of the knob.
        mistake: what is planted, and by what.
        on: turns it on; None for what the simulator always does.
        holds: whether what must hold does. It may raise instead.
    """

    name: str
    mistake: str
    plant: Callable[[Patch], object]
    on: Callable[[], AbstractContextManager[Any]] | None
    holds: Callable[[], bool]


def is_true(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except Exception:
        return False


# The mistakes -----------------------------------------------------------------------------------------


def raise_it(_device: torch.device, error: Exception) -> None:
    raise error


def one_face_only(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def know_one_face_only(patch: Patch) -> None:
    for module in (copies, transaction):
        patch.setattr(module, "is_out_of_memory", one_face_only)


def take_the_threads_error_only(patch: Patch) -> None:
    def clear(_index: int) -> None:
        for get_last_error in pinning._get_last_error():
            get_last_error()

    patch.setattr(pinning, "_clear_error", clear)


def unlock_at_once(patch: Patch) -> None:
    patch.setattr(unlocking, "begin", lambda _owner, _nbytes, release: release(lambda: True))


def lock_all_in_one_piece(patch: Patch) -> None:
    for module in (blocks, copies.blocks):
        patch.setattr(module, "PIECE", 1 << 40)


def use_pytorchs_pinned_tensors(patch: Patch) -> None:
    allocate = arena.allocate

    def allocate_pinned(sizes: Any, released: Any) -> Any:
        torch.empty(1, pin_memory=True)
        return allocate(sizes, released)

    patch.setattr(arena, "allocate", allocate_pinned)


def let_failures_pass(patch: Patch) -> None:
    patch.setattr(streaming.StreamingRestore, "_park_again", lambda _self: None)


# The table --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def allocator(kind: str) -> Iterator[None]:
    torch.cuda.empty_cache()
    before = simcuda.set_allocator(kind)
    try:
        yield
    finally:
        torch.cuda.empty_cache()
        simcuda.set_allocator(before)


@contextlib.contextmanager
def setting(turn: Callable[[Any], object], value: Any, after: Any) -> Iterator[None]:
    turn(value)
    try:
        yield
    finally:
        turn(after)


def out_of_memory_of_the_device() -> torch.AcceleratorError:
    return torch.AcceleratorError("CUDA error: out of memory")


def no_release(patch: Patch) -> None:
    patch.setattr(devices, "release_cached", lambda _devices: True)


KNOBS = [
    Knob(
        "fail op",
        "what a digest raises is let through",
        lambda patch: patch.setattr(digest, "note_failure", raise_it),
        lambda: simcuda.fail("op:_int_mm", min_rows=4097, times=10_000),
        knobs.goes_and_comes_home,
    ),
    Knob(
        "fail alloc with AcceleratorError",
        "only OutOfMemoryError is out of memory",
        know_one_face_only,
        lambda: simcuda.fail("alloc", nth=2, error=out_of_memory_of_the_device(), times=99),
        knobs.what_no_device_has_room_for_is_refused_with_figures,
    ),
    Knob(
        "set_pinned_limit: a refusal raises later",
        "only the thread's own error is taken away",
        take_the_threads_error_only,
        lambda: setting(simcuda.set_pinned_limit, 0, None),
        knobs.others_find_no_error_after_a_park,
    ),
    Knob(
        "contexts are counted",
        "devices without a context are asked too",
        lambda patch: patch.setattr(devices, "has_context", lambda _device: True),
        None,
        knobs.no_other_context_is_made,
    ),
    Knob(
        "set_workspaces",
        "cuBLAS's workspaces are not cleared",
        lambda patch: patch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None),
        lambda: setting(simcuda.set_workspaces, "8MiB", 0),
        knobs.nothing_is_left_on_the_device,
    ),
    Knob(
        "unpin rate",
        "no spare is kept for the next park",
        lambda patch: patch.setattr(arena, "_fitting_spare", lambda _nbytes: None),
        None,
        knobs.nothing_is_unlocked_from_park_to_park,
    ),
    Knob(
        "on_driver_call: the driver's lock",
        "memory is unlocked where it is given back, under the locks of a move",
        unlock_at_once,
        None,
        knobs.nobody_holds_a_lock_of_ours_while_memory_is_unlocked,
    ),
    Knob(
        "driver_counters: how long it is held",
        "a whole block is locked by one registration",
        lock_all_in_one_piece,
        None,
        knobs.no_call_keeps_the_driver_for_long,
    ),
    *[
        Knob(
            f"set_allocator {kind}",
            "the allocator's cache is not emptied after a move",
            no_release,
            lambda kind=kind: allocator(kind),
            knobs.the_driver_gets_it_back_for_others,
        )
        for kind in ("native", "expandable", "async")
    ],
    Knob(
        "cost of emptying the cache",
        "it is emptied after each of several moves",
        lambda patch: patch.setattr(devices, "released_once", contextlib.nullcontext),
        lambda: allocator("native"),
        knobs.the_cache_is_emptied_once_for_several,
    ),
    Knob(
        "flag 8 is refused",
        "memory is registered as read-only",
        lambda patch: patch.setattr(pinning, "PORTABLE", 1 | 8),
        None,
        knobs.parked_bytes_are_page_locked,
    ),
    Knob(
        "set_pinned_limit: copies tell",
        "what is not locked is copied as it is, without the ring",
        lambda patch: patch.setattr(copies.Transfer, "_ring_is_locked", lambda *_: False),
        lambda: setting(simcuda.set_pinned_limit, "48MiB", None),
        knobs.everything_crosses_from_locked_memory,
    ),
    Knob(
        "on_copy and counters",
        "mirrors are not found again",
        lambda patch: patch.setattr(MoveTransaction, "use_mirrors", lambda _self: None),
        None,
        knobs.the_second_park_copies_nothing,
    ),
    Knob(
        "flip_bit",
        "verification proves everything",
        lambda patch: patch.setattr(transaction, "prove", lambda *_: True),
        knobs.bits_flip.on,
        knobs.a_bad_copy_is_found,
    ),
    Knob(
        "fail copy, late",
        "a copy that fails on its way is not undone",
        let_failures_pass,
        knobs.copies_fail.on,
        knobs.a_failed_arrival_leaves_it_parked,
    ),
    Knob(
        "fail pinned_alloc",
        "PyTorch's pinned allocator is used, which rounds up to powers of two",
        use_pytorchs_pinned_tensors,
        None,
        knobs.pytorchs_pinned_allocator_is_not_used,
    ),
    Knob(
        "lost_context",
        "a spoilt context is not recognized",
        lambda patch: patch.setattr(devices, "lost", lambda *_: None),
        None,
        knobs.a_lost_device_is_named,
    ),
    Knob(
        "capturing",
        "nobody asks whether a graph is captured",
        lambda patch: patch.setattr(devices, "is_capturing", lambda: False),
        None,
        knobs.a_capture_is_left_alone,
    ),
    Knob(
        "late copies",
        "a copy stream does not wait for what is queued on others",
        lambda patch: patch.setattr(devices, "wait_for_work", lambda *_: None),
        None,
        knobs.what_is_queued_is_waited_for,
    ),
    Knob(
        "set_integrated",
        "a device that shares the host's memory is not recognized",
        lambda patch: patch.setattr(devices, "shares_memory_with_host", lambda _device: False),
        lambda: setting(lambda is_so: simcuda.set_integrated(0, is_so), True, False),
        knobs.the_doctor_says_where_parking_gains_nothing,
    ),
    Knob(
        "set_memory",
        "room on the device is not asked for first",
        lambda patch: patch.setattr(budget, "require", lambda *_: None),
        lambda: setting(simcuda.set_memory, "64MiB", "4GiB"),
        knobs.room_is_asked_for_before_the_first_byte,
    ),
]


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: Patch) -> None:
    """Nothing is known of earlier tests: of digests, nor how much the arena needed."""
    arena.trim()
    monkeypatch.setattr(arena, "_most_held", 0)
    monkeypatch.setattr(choosing, "_chosen", {})
    monkeypatch.setattr(choosing, "_failed", set())
    simcuda.reset_counters()


def by_name(knobs: list[Knob]) -> list[Any]:
    return [pytest.param(knob, id=f"{knob.name}: {knob.mistake}") for knob in knobs]


@pytest.mark.parametrize("knob", by_name(KNOBS))
def test_it_holds(knob: Knob) -> None:
    with knob.on() if knob.on is not None else contextlib.nullcontext():
        assert knob.holds()


@pytest.mark.parametrize("knob", by_name(KNOBS))
def test_the_mistake_is_caught(knob: Knob, monkeypatch: Patch) -> None:
    knob.plant(monkeypatch)
    with knob.on() if knob.on is not None else contextlib.nullcontext():
        assert not is_true(knob.holds)


@pytest.mark.parametrize("knob", by_name([knob for knob in KNOBS if knob.on is not None]))
def test_nobody_would_know_without_the_knob(knob: Knob, monkeypatch: Patch) -> None:
    knob.plant(monkeypatch)
    assert knob.holds()
