"""Streaming restore: parks, moves, changes, deletions and mirrors of a model that is still
arriving."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory import arena
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.snapshots import contents, snapshot
from tests.builders.streaming import is_arriving, stream_in

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


# Whatever comes while it arrives -----------------------------------------------------------------


def test_a_park_waits_and_copies_nothing(gpu: GPU) -> None:
    model = layers(4)
    before = contents(model)
    for _ in range(3):
        parked = qmove.park(model)
        assert contents(model) == before
        stream_in(model)
    assert parked.copied_bytes == 0
    qmove.park(model)
    assert gpu.allocated() == 0


def test_a_change_while_it_arrives_is_kept(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)
    stream_in(model)
    model[1].weight.data.add_(1)
    changed = model[1].weight.nbytes
    streaming.wait_for()
    wanted = contents(model)
    assert qmove.park(model).copied_bytes == changed
    assert contents(model) == wanted


def test_a_second_restore_an_inventory_and_the_books_see_a_model_that_is_home(gpu: GPU) -> None:
    model = layers(4)
    before = snapshot(model)
    qmove.park(model)
    stream_in(model)
    assert not qmove.is_parked(model)
    assert qmove.parked_models() == []
    assert (qmove.stats().parked_models, qmove.stats().parked_bytes) == (0, {})
    assert {holding.device for holding in qmove.inventory(model).holdings} == {gpu.device}
    assert is_arriving()
    assert qmove.restore(model).nbytes == 0
    assert snapshot(model) == before


@pytest.mark.parametrize("target", ["cpu", "cuda:1"])
def test_a_move_waits(gpu: GPU, second_gpu: GPU, target: str) -> None:
    model = layers(4)
    expected, before = model(inputs()).cpu(), contents(model)
    qmove.park(model)
    stream_in(model)
    qmove.move(model, target)
    assert gpu.allocated() == 0
    assert contents(model) == before
    torch.testing.assert_close(model(inputs().to(target)).cpu(), expected)


@pytest.mark.usefixtures("singly")
def test_a_model_that_is_deleted_while_it_arrives_takes_its_memory_along(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)
    stream_in(model)
    model[0](inputs())
    del model
    gc.collect()
    torch.cuda.synchronize()  # no copy writes to what was freed
    other = layers(1)
    qmove.park(other)  # the next move lets go of what copies were still writing to
    gc.collect()
    assert not is_arriving()
    assert gpu.allocated() == 0
    assert arena.bytes_in_use() == arena.bytes_for([16384, 256])
    assert qmove.parked_models() == [other]


def test_a_layer_that_is_taken_out_while_it_arrives_works(gpu: GPU) -> None:
    model = layers(4)
    expected = model[3](inputs())
    qmove.park(model)
    stream_in(model)
    head = model[3]
    del model
    gc.collect()
    assert torch.equal(head(inputs()), expected)
    assert type(head) is nn.Linear


def test_two_models_arrive_at_once(gpu: GPU) -> None:
    first, second = layers(4), layers(3)
    expected, other = first(inputs()), second(inputs())
    qmove.park(first)
    qmove.park(second)
    stream_in(first)
    qmove.restore(second, stream=True)
    assert len(streaming._under_way) == 2
    assert torch.equal(second(inputs()), other)
    assert torch.equal(first(inputs()), expected)
    assert not is_arriving()


def test_a_model_on_two_devices_streams_to_both(gpu: GPU, second_gpu: GPU) -> None:
    model = nn.Sequential(layers(2, device="cuda:0"), layers(2, device="cuda:1"))
    before = snapshot(model)
    qmove.park(model)
    stream_in(model)
    model[0](inputs())
    model[1](inputs().to("cuda:1"))
    streaming.wait_for()
    assert snapshot(model) == before
    assert qmove.park(model).copied_bytes == 0


# Mirrors -----------------------------------------------------------------------------------------


def test_an_alias_that_was_written_to_while_the_model_arrived_comes_along(gpu: GPU) -> None:
    model = layers(12, width=1024)
    expected = model[1].weight + 1
    qmove.park(model)
    state = model.state_dict()
    stream_in(model)
    state["1.weight"].add_(1)
    streaming.wait_for()
    assert torch.equal(model[1].weight, expected)
    assert state["1.weight"].data_ptr() == model[1].weight.data_ptr()


def test_an_alias_that_nobody_sees_being_written_to_makes_no_false_mirror(gpu: GPU) -> None:
    model = layers(12, width=1024)  # large enough that digests are taken on the device
    before = contents(model)
    qmove.park(model)
    alias = torch.empty(0)
    alias.data = model[1].weight
    stream_in(model)
    torch.cuda.synchronize()  # the bytes are on the device now
    alias.add_(1)
    del alias
    streaming.wait_for()
    assert contents(model) == before
    qmove.park(model)
    assert contents(model) == before


def test_what_came_home_streaming_has_mirrors(gpu: GPU) -> None:
    model = layers(8, width=512)
    before, parked = snapshot(model), qmove.park(model)
    for _ in range(2):
        stream_in(model)
        model(inputs(512))
        assert qmove.stats().mirror_bytes == parked.nbytes
        assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert snapshot(model) == before
