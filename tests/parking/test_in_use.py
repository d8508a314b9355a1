"""A forward that runs in another thread is not robbed of its weights, and a pinned model stays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import in_use, pins, sleeping, streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.places import places
from tests.builders.snapshots import snapshot, traces

pytestmark = pytest.mark.simulated


class Held(nn.Module):
    """Stops in the middle of its forward, with a part of its weights read, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = layers(2)
        self.weight = nn.Parameter(torch.ones(64, device="cuda"), requires_grad=False)
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.stops = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.data
        if self.stops:
            self.entered.set()
            assert self.go_on.wait(60)
        return self.inner(x * weight)


@contextmanager
def running(model: Held, results: list[Any]) -> Iterator[None]:
    """A thread is inside of the forward of a model while the body begins."""

    def call() -> None:
        try:
            results.append(model(inputs()))
        except BaseException as error:
            results.append(error)

    model.stops = True
    thread = threading.Thread(target=call, name="forward")
    thread.start()
    assert model.entered.wait(60)
    try:
        yield
    finally:
        model.go_on.set()
        thread.join()
        model.stops = False


MOVES: dict[str, Callable[[Any], Any]] = {
    "park": qmove.park,
    "move": lambda model: qmove.move(model, "cpu"),
    "swap": lambda model: qmove.swap(model, parked_one()),
}


def parked_one() -> nn.Module:
    model = layers(1)
    qmove.park(model)
    return model


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_move_says_that_the_model_is_in_use_and_leaves_it_as_it_is(
    gpu: GPU, move: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_use, "PATIENCE", 0.05)
    model, results = Held(), []
    expected, before = model(inputs()), snapshot(model)
    with running(model, results):
        quiet = traces(model)
        with pytest.raises(qmove.InUse, match="'forward', has been inside of it"):
            move(model)
        assert snapshot(model) == before and traces(model) == quiet
        assert not qmove.is_parked(model)
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_move_waits_for_a_forward_that_runs(
    gpu: GPU, move: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, results = Held(), []
    expected = model(inputs())
    seen = in_use._thread_inside

    def look(modules: set[int], wakes: bool) -> str | None:
        thread = seen(modules, wakes)
        if thread == "forward":
            model.go_on.set()  # only now: the move waits
        return thread

    monkeypatch.setattr(in_use, "_thread_inside", look)
    with running(model, results):
        move(model)
    assert torch.equal(results[0], expected)
    if move is not MOVES["move"]:
        assert torch.equal(model(inputs()), expected)


def test_two_threads_in_a_tight_loop(gpu: GPU) -> None:
    model = layers(6)
    expected = model(inputs())
    wrong: list[Any] = []
    ended = threading.Event()

    def call() -> None:
        while not ended.is_set():
            try:
                if not torch.equal(model(inputs()), expected):
                    wrong.append("another result")
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(60):
        qmove.park(model)
    ended.set()
    thread.join()
    assert not wrong
    streaming.wait_for()
    qmove.restore(model)
    assert not sleeping._wakers
    assert {type(parameter) for parameter in model.parameters()} == {nn.Parameter}


def test_a_thread_that_only_waits_for_the_move_is_not_waited_for(gpu: GPU) -> None:
    model, other = layers(2), layers(2)
    expected = other(inputs())
    results: list[Any] = []
    qmove.park(model)
    thread = threading.Thread(target=lambda: results.append(model(inputs())))

    def progress(done: int, total: int) -> None:
        if not thread.is_alive() and not results:
            thread.start()  # it waits for the lock, inside of a call of `model`

    qmove.restore(model, progress=progress)
    qmove.park(other)
    thread.join()
    assert torch.equal(results[0], expected)


# Pins ---------------------------------------------------------------------------------------------


def in_another_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, name="another")
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"a": m}, lambda m: m[0]])
@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_a_pinned_model_is_not_moved_by_another_thread(
    gpu: GPU, move: Callable[[Any], Any], wrap: Callable[[Any], Any]
) -> None:
    model = layers(2)
    qmove.park(model)
    with qmove.resident(model):
        error = in_another_thread(lambda: move(wrap(model)))
        assert isinstance(error, qmove.InUse), error
        assert "'MainThread', keeps it home" in str(error)
        assert places(model) == {"cuda"}
    assert places(model) == {"cpu"}
    assert not pins._pins
    with qmove.resident(model):
        qmove.park(model)  # its own thread may
        assert places(model) == {"cpu"}


def test_the_last_of_two_bodies_that_overlap_parks_it(gpu: GPU) -> None:
    model = layers(2)
    expected = model(inputs())
    qmove.park(model)
    first, second = qmove.resident(model), qmove.resident([model])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert places(model) == {"cuda"}
    second.__exit__(None, None, None)
    assert places(model) == {"cpu"}
    assert torch.equal(model(inputs()), expected)
