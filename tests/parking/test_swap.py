"""A swap: one model leaves while another comes, in both directions at once and without room for
both."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.parking import swapping
from qmove_core.transfer import copies
from tests.builders.arena import wait_until_prepared
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("none_share")]

CHUNK = 2 * copies.STAGING  # what a swap may hold beyond the larger model


def a_pair(parked_count: int = 30, resident_count: int = 40) -> tuple[nn.Module, nn.Module]:
    """A resident model and a parked one that was never on the device with it."""
    coming = layers(parked_count, width=1024)
    qmove.park(coming)
    return layers(resident_count, width=1024), coming


@pytest.mark.parametrize(
    "counts", [(30, 40), (40, 30), (35, 35)], ids=["smaller comes", "larger comes", "same size"]
)
@pytest.mark.parametrize("keep_mirrors", [True, False])
def test_both_models_change_places_exactly_and_within_the_larger_and_a_chunk(
    gpu: GPU, counts: tuple[int, int], keep_mirrors: bool
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    leaving, coming = a_pair(*counts)
    sizes = [qmove.inventory(model).nbytes for model in (leaving, coming)]
    home = {name: tensor.clone() for name, tensor in coming.state_dict().items()}
    before = snapshot(leaving)
    gpu.reset_peak()
    simcuda.reset_counters()

    parked, restored = qmove.swap(leaving, coming)

    counters = simcuda.counters()
    assert gpu.peak() <= max(sizes) + CHUNK
    assert (parked.nbytes, parked.copied_bytes, parked.stragglers) == (sizes[0], sizes[0], [])
    assert (restored.nbytes, restored.copied_bytes) == (sizes[1], sizes[1])
    assert counters.h2d_bytes == sizes[1]
    assert (
        sizes[0] <= counters.d2h_bytes <= sizes[0] + 64 * (sizes[1] // (512 << 10) + len(home))
    )  # and digests
    assert qmove.is_parked(leaving)
    assert not qmove.is_parked(coming)
    assert all(
        torch.equal(tensor.cpu(), home[name]) for name, tensor in coming.state_dict().items()
    )
    assert gpu.allocated() == sizes[1]
    qmove.park(coming)
    qmove.restore(leaving)
    assert snapshot(leaving) == before


def test_both_directions_of_the_link_are_used_at_once(gpu: GPU) -> None:
    leaving, coming = a_pair(40, 40)
    qmove.restore(coming)
    qmove.configure(keep_mirrors=False)
    qmove.park(coming)
    seconds = qmove.inventory(leaving).nbytes / simcuda.link.current().d2h_pinned
    qmove.prepare(leaving)
    wait_until_prepared()
    simcuda.clock.reset()

    qmove.swap(leaving, coming)

    assert (
        seconds <= simcuda.clock.now() <= 1.5 * seconds
    )  # one after the other would take twice as long


def test_ten_swaps_of_unchanged_models_copy_each_out_once(gpu: GPU) -> None:
    resident, parked = a_pair(10, 10)
    nbytes = qmove.inventory(resident).nbytes
    copied = []
    gc.disable()  # a swap leaves nothing behind that only a collection would drop, and that keeps host copies from being mirrors
    try:
        for _swap in range(10):
            out, into = qmove.swap(resident, parked)
            copied.append((out.copied_bytes, into.copied_bytes))
            resident, parked = parked, resident
    finally:
        gc.enable()

    assert copied == [(nbytes, nbytes)] + 9 * [(0, nbytes)]  # the other one had been parked before
    assert gpu.allocated() == nbytes


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 3, 6, 9, 12])
def test_a_swap_whose_nth_copy_fails_leaves_both_where_they_were(
    gpu: GPU, error: Any, nth: int
) -> None:
    leaving, coming = a_pair(30, 30)
    before, parked, allocated = snapshot(leaving), snapshot(coming), gpu.allocated()

    with pytest.raises(error or RuntimeError), simcuda.fail("copy", nth=nth, error=error) as fault:
        qmove.swap(leaving, coming)

    assert fault.fired == 1
    assert not qmove.is_parked(leaving)
    assert snapshot(leaving) == before
    assert qmove.is_parked(coming)
    assert snapshot(coming) == parked
    assert gpu.allocated() == allocated
    qmove.swap(leaving, coming)
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (True, False)


def test_with_no_way_back_the_leaving_model_is_parked_whole(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaving, coming = a_pair(30, 30)
    before = {name: tensor.cpu() for name, tensor in leaving.state_dict().items()}

    def no_way_back(plan: object) -> None:
        raise qmove.QMoveError("planted")

    monkeypatch.setattr(swapping, "carry_out", no_way_back)
    with pytest.raises(torch.AcceleratorError, match="injected"), simcuda.fail("copy", nth=6):
        qmove.swap(leaving, coming)
    monkeypatch.undo()

    assert qmove.is_parked(leaving)
    assert qmove.is_parked(coming)
    x = torch.ones(1, 1024, device=gpu.device)
    leaving(x)  # it wakes by itself
    assert all(
        torch.equal(tensor.cpu(), before[name]) for name, tensor in leaving.state_dict().items()
    )


def test_too_little_room_even_without_the_leaving_one_is_said_before_anything_moves(
    gpu: GPU,
) -> None:
    leaving, coming = a_pair(40, 10)
    before = snapshot(leaving)
    simcuda.set_memory(torch.cuda.memory_allocated() + (1 << 20), device=0)

    with pytest.raises(qmove.NotEnoughMemory) as raised:
        qmove.swap(leaving, coming)

    assert raised.value.needed == qmove.inventory(coming).nbytes - qmove.inventory(leaving).nbytes
    assert not qmove.is_parked(leaving)
    assert snapshot(leaving) == before


def test_a_swap_on_a_full_device_needs_no_more_than_the_larger_model(gpu: GPU) -> None:
    leaving, coming = a_pair(30, 30)
    home = {name: tensor.clone() for name, tensor in coming.state_dict().items()}
    simcuda.set_memory(torch.cuda.memory_allocated(), device=0)

    qmove.swap(leaving, coming)

    assert all(
        torch.equal(tensor.cpu(), home[name]) for name, tensor in coming.state_dict().items()
    )


def test_models_that_share_weights_go_one_after_the_other(gpu: GPU) -> None:
    leaving, coming = layers(3), layers(2)
    coming[0].weight = leaving[0].weight
    qmove.park(coming)
    qmove.restore(leaving)
    before = {name: tensor.cpu() for name, tensor in coming.state_dict().items()}

    qmove.swap(leaving, coming)

    assert not qmove.is_parked(coming)
    assert all(
        torch.equal(tensor.cpu(), before[name]) for name, tensor in coming.state_dict().items()
    )
    coming(torch.ones(1, 64, device=gpu.device))


@pytest.mark.parametrize("what", ["nothing to park", "nothing to bring", "verify"])
def test_where_there_is_nothing_to_overlap_it_is_a_park_and_a_restore(gpu: GPU, what: str) -> None:
    leaving, coming = a_pair(2, 2)
    if what == "nothing to park":
        qmove.park(leaving)
    elif what == "nothing to bring":
        qmove.restore(coming)
    qmove.configure(verify=what == "verify")

    parked, restored = qmove.swap(leaving, coming)

    assert (parked.nbytes > 0) == (what != "nothing to park")
    assert (restored.nbytes > 0) == (what != "nothing to bring")
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (True, False)


def test_progress_covers_both_ways_and_stops_both(gpu: GPU) -> None:
    leaving, coming = a_pair(10, 10)
    total = qmove.inventory(leaving).nbytes + qmove.inventory(coming).nbytes
    seen: list[tuple[int, int]] = []

    qmove.swap(leaving, coming, progress=lambda done, of: seen.append((done, of)))

    assert seen[-1] == (total, total)
    assert [done for done, _total in seen] == sorted(done for done, _total in seen)

    def stop(done: int, of: int) -> None:
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        qmove.swap(coming, leaving, progress=stop)
    assert (qmove.is_parked(leaving), qmove.is_parked(coming)) == (True, False)
