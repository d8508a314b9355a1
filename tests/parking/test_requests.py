"""What a request reports, and what it does where there was nothing to do or where a host made room."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core import devices, for_hosts, hosting
from qmove_core.memory import arena
from qmove_core.transfer.copies import CopyJob, Transfer
from tests.builders.device import GPU
from tests.builders.models import layers, torchao_layers
from tests.builders.snapshots import snapshot


def test_what_had_nothing_to_do_is_neither_counted_nor_logged(
    gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    model = layers(2)
    caplog.set_level(logging.INFO, "qmove")
    before = qmove.stats()

    qmove.restore(model)  # it is home
    assert (qmove.stats().restores, caplog.messages) == (before.restores, [])
    qmove.park(model)
    assert len(caplog.messages) == 1
    qmove.park(model)

    assert qmove.stats().parks == before.parks + 1
    assert len(caplog.messages) == 1


def test_a_coarse_clock_sees_no_time_pass(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(2)
    before = snapshot(model)
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)

    assert qmove.park(model).seconds == 0
    assert qmove.restore(model).seconds == 0

    assert snapshot(model) == before


@pytest.mark.simulated
def test_prefetch_copies_nothing_where_the_model_cannot_run_while_it_arrives(gpu: GPU) -> None:
    model = torchao_layers("int8")
    qmove.park(model)
    simcuda.reset_counters()

    assert qmove.prefetch(model) is None

    assert simcuda.counters().h2d_bytes == 0
    assert qmove.is_parked(model)


@pytest.mark.simulated
def test_where_a_host_parks_for_room_the_plan_is_made_again(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(3, width=256)
    before = snapshot(model)
    qmove.park(model)
    qmove.restore(model[2])  # a part that is home, and belongs to another model as well
    other = nn.ModuleList([layers(8, width=256), model[2]])
    monkeypatch.setattr(hosting, "_ask_for_room", [])
    for_hosts.on_shortage(lambda device, nbytes: qmove.park(other) and None)
    simcuda.set_memory(torch.cuda.memory_allocated(), device=0)

    qmove.restore(model)

    assert snapshot(model) == before
    assert not qmove.is_parked(model)


def test_a_batch_that_stays_on_the_host_is_copied_whole(gpu: GPU) -> None:
    sources = arena.allocate([64, 64, 64], lambda cdata: None)
    for index, storage in enumerate(sources):
        storage.copy_(torch.full((64,), index + 1, dtype=torch.uint8).untyped_storage())
    targets = arena.allocate([64, 64, 64], lambda cdata: None)
    jobs = [CopyJob(s, devices.CPU, t) for s, t in zip(sources, targets, strict=True)]

    with Transfer(192) as transfer:
        transfer.copy(jobs)

    assert [s.tolist() for s in targets] == [s.tolist() for s in sources]
