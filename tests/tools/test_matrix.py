"""The matrix of releases: what is counted of a run, and how a cell that could not be had is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import matrix

REPORT = """<testsuites><testsuite>
<testcase classname="a" name="one"/>
<testcase classname="a" name="two"><failure message="assert 1 == 2&#10;E  AssertionError: x | y"/></testcase>
<testcase classname="a" name="three"><error message="fixture failed"/></testcase>
<testcase classname="a" name="four"><skipped message="Skipped: no device"/></testcase>
<testcase classname="a" name="five"><skipped message="no device"/></testcase>
</testsuite></testsuites>"""


def test_a_run_is_counted_with_its_reasons(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT, encoding="utf-8")
    found = matrix.counted(report)
    assert found["passed"] == 1 and found["skipped"] == {"no device": 2}
    assert found["failed"] == ["a::two: E  AssertionError: x | y", "a::three: fixture failed"]


def test_a_cell_that_cannot_be_had_says_why(tmp_path: Path) -> None:
    cell = matrix.Cell("Python", "3.99", python="3.99", alone=True)
    result = matrix.try_cell(cell, tmp_path)
    assert result["absent"] == "there is no Python 3.99 on this machine"
    assert "not run: there is no Python 3.99" in matrix.render({cell.name: result})


def test_cells_have_names_of_their_own_and_tests_that_are_there() -> None:
    names = [cell.name for cell in matrix.CELLS]
    assert len(set(names)) == len(names)
    assert all((matrix.ROOT / test).exists() for cell in matrix.CELLS for test in cell.tests)


def test_the_document_is_what_the_newest_results_give() -> None:
    if not matrix.RESULTS.exists():
        pytest.skip("make matrix was never run")
    cells = json.loads(matrix.RESULTS.read_text(encoding="utf-8"))["releases"]["by_cell"]
    assert matrix.DOCUMENT.read_text(encoding="utf-8") == matrix.render(cells)
