"""A fault at every point of every operation on every kind of model: afterwards the model is wholly
where it was or wholly where it was going, nothing is kept, and the same operation succeeds.

A normal run tries one point of each kind of fault in each operation, chosen by a seed that changes
with the commit. `make test-faults` tries all of them, or as many as its time allows.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from qmove_core.transfer import copies
from tests.faults.builders import runs
from tests.faults.builders.known import is_known
from tests.faults.builders.points import Case, Point, case_of, cases, try_point
from tests.faults.builders.subjects import SUBJECTS

pytestmark = pytest.mark.simulated

SHOWN = 5  # failures of one operation that are told in full
_left = len(cases())
_ends: float | None = None


@pytest.mark.parametrize(("subject", "operation"), cases(), ids=lambda value: str(value))
def test_a_fault_leaves_it_before_or_after(
    subject: str, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runs.POINT and not runs.POINT.startswith(f"{subject}/{operation}/"):
        pytest.skip("another point was asked for")
    if SUBJECTS[subject].singly:
        monkeypatch.setattr(copies, "SMALL", 0)
    case = case_of(subject, operation, tmp_path)
    tried, failures, ends = Counter[str](), [], _until()
    for point in _chosen(case):
        if ends is not None and time.monotonic() > ends:
            break
        tried["two faults" if point.second else point.fault] += 1
        if problems := try_point(case, point, tmp_path):
            failures.append((point, problems))

    runs.note(
        "every point",
        points=tried.total(),
        points_in_all=case.number_of_points(),
        operations={operation: dict(tried)},
        models={subject: tried.total()},
        failures=[str(point) for point, _problems in failures if not is_known(point)],
        known_failures=sum(is_known(point) for point, _problems in failures),
    )
    told = [f"QMOVE_FAULT_POINT={str(p)!r}\n  " + "\n  ".join(w) for p, w in failures[:SHOWN]]
    assert not failures, f"{len(failures)} of {tried.total()} points:\n" + "\n".join(told)


def _chosen(case: Case) -> Iterable[Point]:
    if runs.POINT:
        return [Point.of(runs.POINT)]
    chosen_by = random.Random(f"{runs.SEED} {case.subject} {case.operation}")
    if not runs.MINUTES:
        return [point for point in case.sample(chosen_by) if not is_known(point)]
    return case.points(chosen_by)


def _until() -> float | None:
    """When this operation's share of the time ends; what others left of theirs is shared, too."""
    global _left, _ends
    seconds = runs.seconds_for("every point")
    if seconds is None:
        return None
    now = time.monotonic()
    _ends = now + seconds if _ends is None else _ends
    _left -= 1
    return now + max(0.0, _ends - now) / (_left + 1)
