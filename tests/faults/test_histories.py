"""Random histories of three models that share storages: whatever is done with them in whatever order,
they stay equal to twins that never moved.

A normal run repeats the same few hundred histories; `make test-faults` goes on to new ones.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

import qmove_core as qmove
from qmove_core.transfer import copies
from tests.faults.builders import histories, runs
from tests.faults.builders.histories import History

pytestmark = pytest.mark.simulated

# No history is made smaller, which takes minutes: delete `phases` for that.
SMALL_RUN = settings(
    derandomize=True,
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LONG_RUN = settings(SMALL_RUN, derandomize=False, max_examples=200, stateful_step_count=60)


@pytest.fixture(autouse=True)
def singly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(copies, "SMALL", 0)
    qmove.configure(disk_folder=tmp_path)


def test_models_stay_equal_to_their_twins() -> None:
    before = histories.steps
    run_state_machine_as_test(History, settings=SMALL_RUN)
    runs.note("histories", histories=SMALL_RUN.max_examples, steps=histories.steps - before)


@pytest.mark.skipif(not runs.MINUTES, reason="make test-faults")
def test_models_stay_equal_to_their_twins_for_long() -> None:
    ends = time.monotonic() + (runs.seconds_for("histories") or 0)
    for number in itertools.count(runs.SEED):
        before = histories.steps
        run_state_machine_as_test(seed(number)(History), settings=LONG_RUN)
        runs.note("histories", histories=200, steps=histories.steps - before)
        if time.monotonic() > ends:
            return


def test_a_list_that_was_parked_twice_in_part_counts_once() -> None:
    history = History()
    history.park_together({0, 1, 2})
    history.compute(0)
    history.park_together({0, 1, 2})
    history.look()
    history.teardown()


def test_a_limit_that_is_refused_leaves_the_one_before() -> None:
    history = History()
    history.begin_a_body_with_a_limit(0, 39)
    history.begin_a_body_with_a_limit(0, 34)  # one layer is larger than that
    history.resident_meanwhile(0)
    history.end_a_body(1)
    history.compute(0)
    history.teardown()
