"""docs/real-cards.md names what is there: each finding has its row, each test and file exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "real-cards.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+) \|$", PAGE, re.M)
FILE = re.compile(r"`((?:tests|qmove_core|simcuda|tools|docs)/[\w/.-]+?\.\w+)((?:::\w+)*)`")
ALONE = re.compile(r"`(?:\.\.\.)?(?:::)?((?:test|Test)\w*?)_?(?:\.\.\.)?`")


def names_in(file: Path) -> set[str]:
    """Test functions and classes of a file."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


EVERYWHERE = {name for file in (ROOT / "tests").rglob("test_*.py") for name in names_in(file)}


def test_every_finding_of_the_audit_has_one_row() -> None:
    assert [int(number) for number, _finding, _what in ROWS] == list(range(1, 27))


@pytest.mark.parametrize(("number", "what"), [(row[0], row[2]) for row in ROWS])
def test_what_a_row_names_is_there(number: str, what: str) -> None:
    named = [*FILE.findall(what), *ALONE.findall(what)]
    assert named or "test of" in what or number in ("22", "24", "25"), "it names no test"
    for file, inside in FILE.findall(what):
        path = ROOT / file
        assert path.exists(), f"there is no {file}"
        for name in inside.split("::")[1:]:
            assert name in names_in(path), f"{file} has no {name}"
    for name in ALONE.findall(what):
        assert any(each.startswith(name) for each in EVERYWHERE), f"there is no test {name}"
    assert "open:" not in what.lower()
