"""The last run: its stages, and what was in use while they ran."""

from __future__ import annotations

import gc

import pytest
import torch
from qmove_pack.nodes.host import browser, settings
from qmove_pack.nodes.host.panel import history

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, node
from tests.nodes.builders.fake_host import FakeHost

PROMPT = {
    "load": node("Load", mib=16, shape="plain"),
    "use": node("Use", model=("load", 0), seed=1),
}


class Graph:
    """Stands for the prompt that runs: all that counts is which one it is."""


@pytest.fixture(autouse=True)
def _no_samples_in_between(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is measured at the stages' ends, so that each test knows its points."""
    monkeypatch.setattr(history, "SECONDS_BETWEEN_SAMPLES", 3600.0)
    monkeypatch.setattr(history, "SECONDS_BETWEEN_EVENTS", 0.01)
    monkeypatch.setattr(history, "SHARE_OF_TIME", 1e9)
    careless_nodes.forget_all()
    monkeypatch.setattr(history, "_last", None)
    host.add(*careless_nodes.ALL)


def test_before_the_first_run_there_is_none() -> None:
    assert history.last_run() is None


def test_a_run_has_its_stages_in_order_and_what_was_in_use_at_their_ends(
    host: FakeHost, gpu: GPU
) -> None:
    before = torch.cuda.memory_allocated()
    host.run(PROMPT)

    run = history.last_run()
    assert run is not None
    assert [(stage["node"], stage["class"]) for stage in run["stages"]] == [
        ("load", "Load"),
        ("use", "Use"),
    ]
    assert run["running"] is False
    times = [time for stage in run["stages"] for time in (stage["begin"], stage["end"])]
    assert times == sorted(times)
    assert run["times"] == sorted(run["times"])
    used = run["used"]["cuda:0"]
    assert len(used) == len(run["times"]) == len(run["parked"])
    assert used[-1] - used[0] == torch.cuda.memory_allocated() - before >= 16 * MIB
    assert run["totals"]["cuda:0"] == torch.cuda.mem_get_info()[1]


def test_what_is_parked_shows(host: FakeHost, gpu: GPU) -> None:
    host.run(PROMPT)
    model = careless_nodes.unwrap(
        getattr(host.cache.entries["load"], "outputs", host.cache.entries["load"])[0][0]
    )
    qmove.park(model)
    host.run({"scratch": node("Scratch", mib=1)})

    run = history.last_run()
    assert run is not None
    assert run["parked"][0] >= 16 * MIB
    assert [stage["node"] for stage in run["stages"]] == ["scratch"]


def test_cached_nodes_are_no_stages_and_a_run_of_only_these_leaves_the_last_one(
    host: FakeHost,
) -> None:
    host.run(PROMPT)
    first = history.last_run()
    host.run(PROMPT)
    assert history.last_run() == first

    host.run(PROMPT | {"use": node("Use", model=("load", 0), seed=2)})
    second = history.last_run()
    assert first is not None
    assert second is not None
    assert second["id"] != first["id"]
    assert [stage["node"] for stage in second["stages"]] == ["use"]


@pytest.mark.parametrize("auto_park", [True, False])
def test_a_stage_that_fails_is_closed_with_the_run(host: FakeHost, auto_park: bool) -> None:
    settings.change({settings.AUTO_PARK: auto_park})
    host.run({"load": PROMPT["load"], "fail": node("Fail", model=("load", 0))})

    run = history.last_run()
    assert host.errors
    assert run is not None
    assert run["running"] is False
    assert [stage["end"] is None for stage in run["stages"]] == [False, False]


def test_the_browser_can_put_the_run_together_from_the_events(host: FakeHost) -> None:
    host.run(PROMPT)

    events = [data for event, data in host.server.sent if event == browser.HISTORY]
    times: list[float] = []
    used: list[int] = []
    for event in events:
        assert event["from"] <= len(times)
        times[event["from"] :] = event["times"]
        used[event["from"] :] = event["used"]["cuda:0"]
    run = history.last_run()
    assert run is not None
    assert (times, used, events[-1]["stages"]) == (
        run["times"],
        run["used"]["cuda:0"],
        run["stages"],
    )
    assert len(events) > 2
    assert sum(len(event["times"]) for event in events) == len(times)  # each point is sent once


def test_many_points_become_fewer_and_the_browser_hears_of_it(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST_POINTS", 8)
    nodes = Graph()
    history.stage_begins(nodes, "1", "Load")
    for _ in range(30):
        history.stage_goes_on(nodes)
    history.run_ends(nodes)

    run = history.last_run()
    assert run is not None
    assert len(run["times"]) <= 8
    assert run["times"] == sorted(run["times"])
    assert run["revision"] > 0
    events = [data for event, data in host.server.sent if event == browser.HISTORY]
    thinned = next(event for event in events if event["revision"])
    assert (
        thinned["from"] == 0
    )  # all points are sent again, as those that the browser has are no longer true
    assert events[-1]["revision"] == run["revision"]


def test_a_prompt_that_the_host_drops_without_a_word_ends_too(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "SECONDS_BETWEEN_SAMPLES", 0.0)
    nodes = Graph()
    history.stage_begins(nodes, "1", "Load")
    run = history._last
    assert run is not None
    del nodes
    gc.collect()

    assert run.ended.wait(60)
    assert run.running is False


def test_a_run_that_goes_on_after_its_last_node_is_still_the_same_run(host: FakeHost) -> None:
    nodes = Graph()
    for node_id in ("1", "2"):
        history.stage_begins(nodes, node_id, "Load")
        history.stage_ends(nodes, node_id)
        history.run_ends(nodes)

    run = history.last_run()
    assert run is not None
    assert [stage["node"] for stage in run["stages"]] == ["1", "2"]
    assert run["running"] is False
