"""Guarantee 3, Atomic: whatever happens, the model is wholly where it was or wholly where it was
going, and nothing is lost."""

from __future__ import annotations

import gc
import signal
import threading
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import homes
from qmove_core.memory import arena
from qmove_core.model import kinds
from qmove_core.transfer import copies
from tests.builders.device import GPU, requested_bytes
from tests.builders.interrupts import Interrupted, ctrl_c_at_line
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


@pytest.fixture(params=["each storage on its own", "batches"])
def several_copies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a small model is copied in several pieces."""
    if request.param == "batches":
        monkeypatch.setattr(copies, "STAGING", 20_000)
    else:
        monkeypatch.setattr(copies, "SMALL", 0)


def devices_of(model: object) -> set[str]:
    return set(qmove.inventory(model).by_device)


@pytest.mark.usefixtures("several_copies")
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_park_whose_nth_copy_fails_half_way_leaves_the_model_on_its_device(
    gpu: GPU, error: Any, nth: int
) -> None:
    model = layers(4)
    before, allocated = snapshot(model), gpu.allocated()

    with pytest.raises(error or RuntimeError), simcuda.fail("copy", nth=nth, error=error) as fault:
        qmove.park(model)

    assert fault.fired == 1
    assert snapshot(model) == before
    assert gpu.allocated() == allocated
    assert arena.bytes_in_use() == 0
    assert not qmove.is_parked(model)
    assert qmove.parked_models() == []


@pytest.mark.usefixtures("several_copies")
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_restore_whose_nth_copy_fails_leaves_the_model_parked(
    gpu: GPU, error: Any, nth: int
) -> None:
    model = layers(4)
    before, empty = snapshot(model), 0
    qmove.park(model)
    parked = snapshot(model)

    with pytest.raises(error or RuntimeError), simcuda.fail("copy", nth=nth, error=error) as fault:
        qmove.restore(model)

    assert fault.fired == 1
    assert snapshot(model) == parked
    assert gpu.allocated() == empty
    assert qmove.is_parked(model)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.usefixtures("several_copies")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("nth", range(1, 9))
def test_a_restore_whose_nth_allocation_fails_leaves_the_model_parked_and_says_what_was_lacking(
    gpu: GPU, nth: int, stream: bool
) -> None:
    model = layers(4)
    before = snapshot(model)
    qmove.park(model)

    with simcuda.fail("alloc", nth=nth, times=100), pytest.raises(qmove.NotEnoughMemory) as raised:
        qmove.restore(model, stream=stream)

    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert gpu.allocated() == 0  # although the exception, and so its traceback, is still alive
    assert qmove.is_parked(model)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("act", [qmove.park, qmove.restore], ids=["park", "restore"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Interrupted])
def test_what_a_progress_callback_raises_stops_the_move_with_nothing_moved(
    gpu: GPU, act: Any, error: Any
) -> None:
    model = layers(4)
    if act is qmove.restore:
        qmove.park(model)
    before = snapshot(model)

    def stop_half_way(done: int, total: int) -> None:
        if done * 2 >= total:
            raise error

    with pytest.raises(error):
        act(model, progress=stop_half_way)

    assert snapshot(model) == before


@pytest.mark.parametrize("act", [qmove.park, qmove.restore], ids=["park", "restore"])
def test_a_failure_after_the_tensors_were_rebound_puts_them_all_back(
    gpu: GPU, act: Any, monkeypatch: Any
) -> None:
    model = layers(4)
    if act is qmove.restore:
        qmove.park(model)
    before = snapshot(model)
    classes = [type(module) for module in model.modules()]
    calls = []

    def refresh_fails_twice(inventory: object) -> None:  # what fails once is begun anew
        calls.append(devices_of(model))
        if len(calls) <= 2:
            raise RuntimeError("planted")

    monkeypatch.setattr(kinds, "refresh", refresh_fails_twice)
    with pytest.raises(RuntimeError, match="planted"):
        act(model)

    assert (
        calls[0] == calls[1] != calls[2]
    )  # it had moved, and was refreshed again after it had moved back
    assert snapshot(model) == before
    assert [type(module) for module in model.modules()] == classes


EIGHTHS = 8


def _is_free(lock: Any) -> bool:
    """Whether another thread could take the lock."""
    taken = []
    thread = threading.Thread(
        target=lambda: taken.append(lock.acquire(blocking=False) and (lock.release() or True))
    )
    thread.start()
    thread.join()
    return taken == [True]


@pytest.mark.parametrize("act", [qmove.park, qmove.restore], ids=["park", "restore"])
@pytest.mark.parametrize("first", range(1, EIGHTHS + 1))
def test_ctrl_c_at_any_line_leaves_the_model_whole(gpu: GPU, act: Any, first: int) -> None:
    """Every line, in eight tests: each tries one in eight, so that none takes minutes."""
    handler = signal.getsignal(signal.SIGINT)
    number, places = first - EIGHTHS, set()
    while True:
        number += EIGHTHS
        model = layers(1)
        before = snapshot(model)
        if act is qmove.restore:
            qmove.park(model)
        finished = False
        try:
            with ctrl_c_at_line(number) as lines:
                act(model)
                finished = lines() < number
        except KeyboardInterrupt:
            pass

        assert signal.getsignal(signal.SIGINT) is handler
        assert gc.isenabled(), number
        assert _is_free(homes.lock), number
        [place] = devices_of(model)  # wholly here or wholly there
        assert qmove.is_parked(model) == (place == "cpu")
        places.add(place)
        qmove.restore(model)
        assert snapshot(model) == before
        assert requested_bytes(gpu.device) - gpu.before == sum(
            p.nbytes for p in model.parameters()
        ), number
        del model
        assert arena.bytes_in_use() == 0
        if finished:
            break

    assert places == {"cpu", "cuda:0"}
    assert number > 100  # it did go through the lines of the move
