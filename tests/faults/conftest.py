"""What all suites of faults have: the seed in the summary, and the results in a file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.builders import runs


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite, figures in runs.noted().items():
        numbers = ", ".join(f"{v:,} {name}" for name, v in figures.items() if type(v) is int)
        terminalreporter.write_line(f"faults, {suite}: {numbers}")
    if runs.noted():
        terminalreporter.write_line(f"QMOVE_FAULT_SEED={runs.SEED} tries the same again")


def pytest_sessionfinish() -> None:
    path = os.environ.get("QMOVE_FAULT_RESULTS")
    if path and runs.noted():
        runs.write(Path(path))
