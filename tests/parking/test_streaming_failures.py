"""Streaming restore: where it cannot stream it waits, and where it fails the model stays parked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.model import kinds
from qmove_core.parking import sleeping, streaming
from tests.builders.device import GPU
from tests.builders.link import copies_queued
from tests.builders.models import inputs, layers, quanto_layers
from tests.builders.models import torchao_layers as torchao
from tests.builders.snapshots import contents, snapshot
from tests.builders.streaming import is_arriving, stream_in

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


# Where it cannot stream it waits -----------------------------------------------------------------


WAITING: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(layers(2), backend="eager"),
    "compiled in place": lambda: (model := layers(2), model.compile(backend="eager"))[0],
    "a compiled part": lambda: nn.Sequential(layers(1), torch.compile(layers(1), backend="eager")),
    "ScriptModule": lambda: torch.jit.script(layers(2)),
    "traced": lambda: torch.jit.trace(layers(2), inputs()),
}


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("build", WAITING.values(), ids=WAITING.keys())
def test_models_that_python_does_not_see_run_wait_for_all(
    gpu: GPU, build: Callable[[], nn.Module]
) -> None:
    model = build()
    expected = model(inputs())
    qmove.park(model)
    qmove.restore(model, stream=True)
    assert not is_arriving() and copies_queued() == 0
    assert torch.equal(model(inputs()), expected)
    qmove.park(model)
    assert torch.equal(model(inputs()), expected), "it wakes so, too"


@pytest.mark.parametrize(
    "build", [lambda: torchao("int8"), lambda: quanto_layers("qint8")], ids=["torchao", "quanto"]
)
def test_wrapper_subclasses_wait_for_all(gpu: GPU, build: Callable[[], nn.Module]) -> None:
    model = build()
    before = snapshot(model)
    qmove.park(model)
    qmove.restore(model, stream=True)
    assert not is_arriving() and copies_queued() == 0
    assert snapshot(model) == before


def test_a_restore_that_reports_progress_waits_for_all(gpu: GPU) -> None:
    model = layers(2)
    done: list[int] = []
    parked = qmove.park(model)
    qmove.restore(model, stream=True, progress=lambda so_far, _total: done.append(so_far))
    assert done[-1] == parked.nbytes
    assert not is_arriving() and copies_queued() == 0


@pytest.mark.usefixtures("compiling", "singly")
def test_a_compiled_function_around_a_model_that_arrives_is_not_too_early(gpu: GPU) -> None:
    model = layers(3)
    expected = model(inputs())
    compiled = torch.compile(lambda x: model(x), backend="eager")
    for begin in (lambda: None, lambda: stream_in(model), lambda: None):
        assert torch.equal(compiled(inputs()), expected)
        qmove.park(model)
        begin()
        assert torch.equal(compiled(inputs()), expected)


# Failures ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("keep_mirrors", [False, True])
@pytest.mark.parametrize("nth", [1, 3, 8])
def test_a_copy_that_fails_on_its_way_leaves_the_model_parked_with_its_bytes(
    gpu: GPU, nth: int, keep_mirrors: bool
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    model, x = layers(4), inputs()
    before, expected = snapshot(model), model(x)
    qmove.park(model)
    parked, around = snapshot(model), gpu.allocated()

    with (
        simcuda.fail("copy", nth=nth, late=True) as fault,
        pytest.raises(RuntimeError, match="injected"),
    ):
        qmove.restore(model, stream=True)
        model(x)

    assert fault.fired == 1
    assert qmove.is_parked(model)
    assert qmove.parked_models() == [model]
    assert snapshot(model) == parked
    assert gpu.allocated() == around
    torch.cuda.synchronize()  # no copy was left behind that writes to what was freed
    assert torch.equal(model(x), expected), "it sleeps again, and wakes"
    streaming.wait_for()
    assert snapshot(model) == before


@pytest.mark.usefixtures("singly")
def test_a_failed_arrival_does_not_undo_what_the_host_changed(gpu: GPU) -> None:
    model = layers(3)
    qmove.park(model)
    model[1].weight.data.add_(1)
    wanted = contents(model)
    with simcuda.fail("copy", nth=4, late=True), pytest.raises(RuntimeError, match="injected"):
        qmove.restore(model, stream=True)
        streaming.wait_for()
    assert contents(model) == wanted
    qmove.restore(model)
    assert contents(model) == wanted


@pytest.mark.parametrize("at", ["refresh", "put_to_sleep", "put_away"])
def test_a_start_that_fails_leaves_the_model_parked_and_the_device_empty(
    gpu: GPU, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(4)
    before, empty = snapshot(model), torch.cuda.memory_allocated() - gpu.allocated()
    qmove.park(model)
    parked = snapshot(model)
    place = {"refresh": kinds, "put_to_sleep": sleeping, "put_away": streaming}[at]
    real, calls = getattr(place, at), []

    def fails_twice(*arguments: Any) -> None:  # what fails once is begun anew
        calls.append(at)
        if len(calls) in ((1, 2) if at == "refresh" else (2, 3)):
            raise RuntimeError("planted")
        real(*arguments)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted") as raised:
        patched.setattr(place, at, fails_twice)
        qmove.restore(model, stream=True)
        assert at == "refresh"
        streaming.wait_for()

    assert not is_arriving()
    assert qmove.is_parked(model)
    assert snapshot(model) == parked
    assert torch.cuda.memory_allocated() == empty and raised.value is not None
    qmove.restore(model, stream=True)
    streaming.wait_for()
    assert snapshot(model) == before


def test_too_little_vram_leaves_the_model_parked(gpu: GPU) -> None:
    model = layers(4)
    expected, before = model(inputs()), snapshot(model)
    parked = qmove.park(model)
    bytes_parked = snapshot(model)
    simcuda.set_memory(torch.cuda.memory_allocated() + parked.nbytes - 1)
    for attempt in (lambda: qmove.restore(model, stream=True), lambda: model(inputs())):
        with pytest.raises(qmove.NotEnoughMemory):
            attempt()
        assert qmove.is_parked(model) and not is_arriving()
        assert snapshot(model) == bytes_parked
    simcuda.set_memory("4GiB")
    assert torch.equal(model(inputs()), expected)
    streaming.wait_for()
    assert snapshot(model) == before
