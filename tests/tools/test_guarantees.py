"""docs/guarantees.md is up to date: what it names is there, and what must be named is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import guarantees

ROOT = Path(__file__).parents[2]
TEXT = guarantees.DOCUMENT.read_text(encoding="utf-8")
NAMED = sorted({file for promise in guarantees.PROMISES for file in promise.files})


@pytest.mark.parametrize("file", NAMED)
def test_each_named_file_is_there(file: str) -> None:
    assert (ROOT / file).is_file()


@pytest.mark.parametrize("room", ["guarantees", "faults", "nodes/routes"])
def test_each_file_of_promises_is_named(room: str) -> None:
    there = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests" / room).glob("test_*.py")
    }
    assert there and there <= set(NAMED)


def test_the_document_is_what_the_tool_writes() -> None:
    """But for the numbers of cases, and what long runs have tried: those change from run to run."""
    counts = guarantees.counts_in(TEXT)
    assert TEXT.startswith(guarantees.render(*counts)), "run: python -m tools.guarantees"
    assert guarantees.LONG_RUNS in TEXT
    assert all(counts[0][file] > 0 for file in NAMED)


def test_results_of_long_runs_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faults.json").write_text(
        '{"memory": {"cycles": 11000, "seed": 5, "date": "2026-11-26", "commit": "abc", "minutes": 3}}'
    )
    monkeypatch.setattr(guarantees, "RESULTS", tmp_path)
    assert "| memory | 11,000 cycles | 2026-11-26 | abc | 3 |" in guarantees.long_runs()


def test_the_readme_leads_there() -> None:
    assert "(docs/guarantees.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
