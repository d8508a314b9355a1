"""The suite of faults can fail: each kind of fault strikes, and a missing rollback is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmove_core.transfer import copies, transaction
from qmove_core.transfer.transaction import MoveTransaction
from tests.faults.builders.faults import FAULTS
from tests.faults.builders.operations import OPERATIONS
from tests.faults.builders.points import Point, act, begin, case_of, try_point

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SMALL", 0)


@pytest.mark.parametrize("name", FAULTS)
def test_each_kind_of_fault_strikes_at_its_first_event_and_not_behind_its_last(
    name: str, tmp_path: Path
) -> None:
    operation = "restore" if "device allocation" in name else "park"
    counts = case_of("plain", operation, tmp_path).counts
    for nth, strikes in ((1, True), (counts[FAULTS[name].counts] + 100, False)):
        _base, subject = begin("plain", OPERATIONS[operation], tmp_path)
        raised, struck, _unraised = act(OPERATIONS[operation], [(FAULTS[name], nth)], subject)
        assert bool(struck) is strikes
        assert strikes or raised is None


@pytest.mark.parametrize("fault", ["late copy", "copy half done", "Ctrl-C in a wait"])
def test_a_park_that_keeps_what_it_allocated_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("plain", "park", tmp_path)
    point = Point("plain", "park", fault, 2)
    assert try_point(case, point, tmp_path) == []
    kept: list[object] = []

    def exit_and_keep(self: MoveTransaction, *_error: object) -> None:
        kept.extend(move.target for move in self.moves)

    monkeypatch.setattr(MoveTransaction, "__exit__", exit_and_keep)
    assert any("host bytes" in problem for problem in try_point(case, point, tmp_path))
    kept.clear()


def test_a_commit_that_stops_half_way_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = case_of("plain", "park", tmp_path)
    monkeypatch.setattr(transaction, "all_or_nothing", lambda step, *_undo: step())
    found = [
        problem
        for nth in range(1, case.counts["line"], 17)
        for problem in try_point(
            case, Point("plain", "park", "another thread's exception at a line", nth), tmp_path
        )
    ]
    assert any(problem.startswith("half: ") for problem in found)
