"""docs/kinds.md says what docs/results/kinds.json says, and its columns are the suite's checks."""

from __future__ import annotations

import json

import pytest

from tests.kinds.checks import CHECKS
from tests.kinds.registry import KINDS
from tools import kinds

RUN = {
    "date": "2026-01-02",
    "commit": "abc",
    "torch": "2.13",
    "passed": 1,
    "left_out": 2,
    "failures": ["one: parked"],
    "by_kind": {
        "one": {"needs": "some 1.0", "checks": {"parked": "failed", "restored": "passed"}},
        "two": {"needs": "some 1.0", "checks": {"parked": "a | reason", "restored": "passed"}},
        "three": {"needs": "", "checks": {"parked": "not installed"}},
    },
}


def test_the_columns_are_the_checks_of_the_suite() -> None:
    assert list(kinds.CHECKS) == list(CHECKS)


def test_no_two_kinds_have_one_name() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert {check for kind in KINDS for check in kind.cannot} <= set(CHECKS)


def test_contributing_shows_the_smallest_file_of_a_kind_as_it_is() -> None:
    smallest = (kinds.ROOT / "tests/kinds/formats/hqq.py").read_text(encoding="utf-8")
    assert smallest.strip() in (kinds.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_what_failed_was_left_out_and_could_not_be_built_is_told_apart() -> None:
    lines = kinds.render(RUN).splitlines()
    rows = {
        line.split(" | ")[0]: line.split(" | ")[1:4]
        for line in lines
        if line[:3] == "| o" or line[:3] == "| t"
    }
    assert rows["| one"] == ["some 1.0", kinds.FAILED, kinds.PASSED]
    assert rows["| two"] == ["some 1.0", "1", kinds.PASSED]
    assert "1. a \\| reason" in lines
    assert "| three | not installed |" in lines


def test_the_document_is_what_the_newest_results_give() -> None:
    if not kinds.RESULTS.exists():
        pytest.skip("make test-kinds was never run")
    [whole] = json.loads(kinds.RESULTS.read_text(encoding="utf-8")).values()
    assert kinds.DOCUMENT.read_text(encoding="utf-8") == kinds.render(whole)
