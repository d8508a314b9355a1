"""One line after a run says what parking has gained, from measured figures; nothing where it was
nothing. Each stage has its peak."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import browser, settings
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.panel import history, summary

from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, node
from tests.nodes.builders.fake_host import FakeHost


@pytest.fixture(autouse=True)
def _nodes(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SECONDS_BETWEEN_SAMPLES", 3600.0)
    monkeypatch.setattr(history, "SECONDS_BETWEEN_EVENTS", 0.01)
    monkeypatch.setattr(history, "SHARE_OF_TIME", 1e9)
    monkeypatch.setattr(history, "_last", None)
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL)


def two_models(seed: int = 0) -> dict[str, Any]:
    """Two models of 16 MiB, each used after it was loaded."""
    return {
        "a": node("Load", mib=16, shape="plain"),
        "use a": node("Use", model=("a", 0), seed=seed),
        "b": node("Load", mib=16, shape="plain", after=("use a", 0)),
        "use b": node("Use", model=("b", 0), seed=seed),
    }


def last_summary() -> dict[str, Any] | None:
    run = history.last_run()
    assert run is not None
    found: dict[str, Any] | None = run["summary"]
    return found


def test_a_run_that_parked_says_what_it_ran_in_and_what_it_would_have_taken(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    settings.change({settings.AUTO_PARK_WHEN: settings.STAGE})
    before = torch.cuda.memory_allocated()
    with caplog.at_level(logging.INFO, logger="qmove"):
        third = {
            "c": node("Load", mib=16, shape="plain", after=("use b", 0)),
            "use c": node("Use", model=("c", 0), seed=0),
        }
        host.run(two_models() | third)

    found = last_summary()
    assert found is not None
    one = gpu.allocated() - before  # of the three the other two are parked
    assert found["device"] == "cuda:0"
    # One at a time; while one is parked, a buffer as large as it, if a reading has met it.
    assert 0.95 * one <= found["used"] - before <= 2.05 * one
    assert found["wanted"] - before == pytest.approx(3 * one, rel=0.05)
    assert len(found["models"]) == 2
    assert found["seconds"] > 0
    assert "2 models stepped aside for" in caplog.text
    events = [data for event, data in host.server.sent if event == browser.HISTORY]
    assert events[-1]["summary"] == found
    assert all(event["summary"] is None for event in events[:-1])


def test_where_everything_fits_nothing_is_said(host: FakeHost) -> None:
    host.run(two_models())
    assert last_summary() is None


def test_a_run_that_fails_boasts_of_nothing(host: FakeHost) -> None:
    settings.change({settings.AUTO_PARK_WHEN: settings.STAGE})
    host.run(two_models() | {"fail": node("Fail", model=("b", 0), after=("use b", 0))})
    assert host.errors
    assert last_summary() is None


def test_what_was_away_all_the_time_is_no_gain() -> None:
    gains = summary.Gains()
    gains.note_use(torch.device("cuda:0"), 20 * MIB, 64 * MIB, is_quiet=True)
    assert gains.summary() is None


def test_what_was_parked_before_the_run_and_stays_so_is_no_gain(host: FakeHost) -> None:
    before = torch.cuda.memory_allocated()
    residency.take_in([_kept := careless_nodes.model_of(32)])
    residency.park(residency.idle_models([]))
    settings.change({settings.AUTO_PARK_WHEN: settings.STAGE})
    host.run(two_models())
    found = last_summary()
    # Nothing, if a reading has met the buffer that a park takes: that is as large as these models.
    assert found is None or found["wanted"] - before < 2.05 * 16 * MIB


def test_moves_at_once_take_their_time_once() -> None:
    assert summary._covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0)]) == pytest.approx(4.0)


def test_a_stage_has_its_peak_also_where_that_was_short(host: FakeHost) -> None:
    prompt = {"scratch": node("Scratch", mib=24)}
    before = torch.cuda.memory_allocated()
    host.run(prompt)
    run = history.last_run()
    assert run is not None
    (stage,) = run["stages"]
    assert stage["peak"]["cuda:0"] >= before + 24 * MIB
    assert max(run["used"]["cuda:0"]) < before + 24 * MIB
