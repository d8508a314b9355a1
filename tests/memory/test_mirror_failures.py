"""Mirrors: whatever fails, a mirror is true or it is gone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.model import kinds
from tests.builders.device import GPU
from tests.builders.interrupts import Interrupted, ctrl_c_at_line
from tests.builders.mirrors import WEIGHT, held, mirrored, round_trip
from tests.builders.models import layers
from tests.builders.snapshots import contents, snapshot

pytestmark = pytest.mark.simulated


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, Interrupted])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_after_a_park_whose_nth_copy_failed_the_next_one_is_right(
    gpu: GPU, error: Any, late: bool, nth: int
) -> None:
    model = mirrored()
    model[1].weight.data.add_(1)
    model[3].weight.data.add_(1)
    before, allocated = snapshot(model), gpu.allocated()

    with (
        pytest.raises(error or RuntimeError),
        simcuda.fail("copy", nth=nth, error=error, late=late) as fault,
    ):
        qmove.park(model)

    assert fault.fired == 1
    assert (snapshot(model), gpu.allocated()) == (before, allocated)
    parked = qmove.park(model)
    assert parked.copied_bytes <= 2 * WEIGHT
    assert contents(model) == {name: content[1] for name, content in before.items()}
    parked.restore()
    assert snapshot(model) == before


def test_after_a_park_that_failed_when_all_was_copied_the_next_one_is_right(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mirrored()
    model[1].weight.data.add_(1)
    before = snapshot(model)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        refresh, calls = kinds.refresh, []

        def fails_twice(held: Any) -> None:  # what fails once is begun anew
            refresh(held)
            calls.append(held)
            if len(calls) <= 2:
                raise RuntimeError("planted")

        patched.setattr(kinds, "refresh", fails_twice)
        qmove.park(model)
    assert snapshot(model) == before

    model[2].weight.data.add_(1)
    wanted = snapshot(model)
    qmove.park(model)
    assert contents(model) == {name: content[1] for name, content in wanted.items()}
    qmove.restore(model)
    assert snapshot(model) == wanted


def test_a_park_that_does_not_fit_keeps_the_mirrors_it_has(gpu: GPU) -> None:
    model = mirrored()
    model.extra = torch.ones(1000, device="cuda")
    qmove.configure(ram_limit=held() + 100)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.park(model)
    qmove.configure(ram_limit=None)
    assert qmove.park(model).copied_bytes == 4000


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # of a Ctrl-C in a finalizer
def test_ctrl_c_in_the_second_park_leaves_no_false_mirror(gpu: GPU) -> None:
    model = layers(1)
    round_trip(model)
    number, finished = 0, False
    while not finished:
        number += 11  # each line takes 30 s
        model[0].weight.data.add_(1)
        wanted = contents(model)
        try:
            with ctrl_c_at_line(number) as lines:
                qmove.park(model)
                finished = lines() < number
        except KeyboardInterrupt:
            pass
        assert contents(model) == wanted, number
        qmove.restore(model)
        assert contents(model) == wanted, number
        qmove.park(model)
        assert contents(model) == wanted, number
        qmove.restore(model)
    assert number > 100, "it did go through the lines of the park"
