"""Keeps what each check of each kind came to, and writes it where QMOVE_KINDS_RESULTS says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.kinds import results

_SINCE = pytest.StashKey[results.Results]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_SINCE] = results.Results()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    case = item.user_properties
    named = dict(case)
    if "kind" in named and (report.when == "call" or report.outcome != "passed"):
        item.config.stash[_SINCE].add(named["kind"], named["check"], named.get("needs", ""), report)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("QMOVE_KINDS_RESULTS")
    if path and not hasattr(session.config, "workerinput"):
        session.config.stash[_SINCE].write(Path(path))
