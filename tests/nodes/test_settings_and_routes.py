"""The switch: defaults, what ComfyUI has stored, what the routes take, and what they tell the
browser."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from qmove_pack.nodes.host import browser, routes, settings
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.panel import events, state
from qmove_pack.nodes.host.stages import job_queue

import qmove_core as qmove
from qmove_core import settings as core_settings
from tests.builders.device import GPU
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.guarded import Guarded


def stored(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "default").mkdir()
    (folder / "default" / "comfy.settings.json").write_text(text)
    paths = ModuleType("folder_paths")
    paths.get_user_directory = lambda: str(folder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)


def test_it_is_on_and_parks_when_needed_unless_told_otherwise() -> None:
    assert settings.current() == {
        "qmove.autoPark": True,
        "qmove.autoParkWhen": "needed",
        "qmove.keepLoaded": True,
        "qmove.keepLoadedLimit": 0,
        "qmove.keepLoadedOwn": False,
        "qmove.keepMirrors": True,
        "qmove.ramLimit": 0,
        "qmove.vramToKeepFree": 0,
        "qmove.idleMinutes": 0,
        "qmove.runAgain": True,
        "qmove.verify": False,
        "qmove.notifications": True,
    }


def test_what_comfyui_has_stored_holds_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored(
        tmp_path,
        monkeypatch,
        json.dumps({"qmove.autoPark": False, "qmove.ramLimit": 1.5, "Comfy.Other": 1}),
    )

    settings.load_stored()

    assert settings.current() == settings.DEFAULTS | {
        "qmove.autoPark": False,
        "qmove.ramLimit": 1.5,
    }
    assert core_settings.settings.ram_limit == 1.5 * 2**30


def test_the_core_follows_each_change_at_once() -> None:
    settings.change({"qmove.ramLimit": 2, "qmove.keepMirrors": False, "qmove.verify": True})
    assert core_settings.settings == core_settings.Settings(
        ram_limit=2 << 30, keep_mirrors=False, verify=True
    )

    settings.change({"qmove.ramLimit": 0})
    assert core_settings.settings == core_settings.Settings(
        ram_limit=None, keep_mirrors=False, verify=True
    )


def test_memory_that_may_not_be_kept_any_longer_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[bool] = []
    monkeypatch.setattr(
        qmove, "trim", lambda: trimmed.append(core_settings.settings.keep_mirrors), raising=False
    )

    settings.change({"qmove.verify": True})
    assert trimmed == []
    settings.change({"qmove.keepMirrors": False})

    assert trimmed == [False]  # after the core knew, so that nothing new is kept


@pytest.mark.parametrize("text", ['{"qmove.autoPark": "yes"}', "no json", "[]"])
def test_a_stored_file_that_does_not_fit_is_told_and_the_defaults_stay(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    guarded: Guarded,
    text: str,
) -> None:
    if not text.startswith("{"):
        guarded.expect("read ComfyUI's stored settings")
    stored(tmp_path, monkeypatch, text)

    settings.load_stored()

    assert settings.current() == settings.DEFAULTS
    assert caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qmove.unknown": 1}, "not a setting of qmove"),
        ({"qmove.autoPark": 1}, "true or false"),
        ({"qmove.autoPark": None}, "true or false"),
        ({"qmove.autoParkWhen": "always"}, '"needed" or "stage"'),
        ({"qmove.autoParkWhen": ["needed"]}, '"needed" or "stage"'),
        ({"qmove.autoPark": False, "qmove.autoParkWhen": "always"}, "not"),
        ({"qmove.ramLimit": -1}, "GiB from 0 to"),
        ({"qmove.ramLimit": "8"}, "GiB from 0 to"),
        ({"qmove.ramLimit": True}, "GiB from 0 to"),
        ({"qmove.ramLimit": float("nan")}, "GiB from 0 to"),
        ({"qmove.vramToKeepFree": 1025}, "GiB from 0 to 1024"),
        ({"qmove.idleMinutes": -0.5}, "minutes from 0 to 10080"),
        ({"qmove.idleMinutes": True}, "minutes from 0 to 10080"),
        ({"qmove.verify": 1}, "true or false"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_reason_and_changes_nothing(
    changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(settings.InvalidSettings, match=reason):
        settings.change(changes)

    assert settings.current() == settings.DEFAULTS


@pytest.mark.parametrize(
    ("read", "body", "reason"),
    [
        (routes.read_park, [], "an object"),
        (routes.read_park, {}, "missing: models"),
        (routes.read_park, {"models": "some"}, '"all" or a list'),
        (routes.read_park, {"models": [True]}, '"all" or a list'),
        (routes.read_park, {"models": [10**9]}, "no such model"),
        (routes.read_park, {"models": "all", "now": True}, "unknown: now"),
        (routes.read_restore, {"models": "all", "device": "cuda:77"}, "no device 'cuda:77'"),
        (routes.read_restore, {"models": "all", "device": 0}, "no device 0"),
        (routes.read_free, {"gib": "4"}, "number of GiB"),
        (routes.read_free, {"gib": True}, "number of GiB"),
        (routes.read_free, {"gib": 0}, "above 0"),
        (routes.read_free, {"gib": float("nan")}, "number of GiB"),
        (routes.read_free, {"gib": 1, "device": "gpu"}, "no device 'gpu'"),
        (routes.read_park, {"node": "5"}, "missing: class"),
        (routes.read_park, {"node": 5, "class": "Load"}, "both are strings"),
        (routes.read_park, {"node": "5", "class": "Load"}, "Run the workflow first"),
        (routes.read_restore, {"node": "5", "class": "Load"}, "Run the workflow first"),
        (routes.read_pin, {"models": []}, "missing: pin"),
        (routes.read_pin, {"models": [], "pin": "cuda:77"}, "pin is one of unpin, pin, cuda:0"),
        (routes.read_pin, {"models": [], "pin": ["pin"]}, "pin is one of"),
        (routes.read_pin, {"models": [], "pin": "cpu"}, "pin is one of"),
        (routes.read_pin, {"models": "all", "pin": "pin"}, "a list of ids"),
        (routes.read_pin, {"node": "5", "class": "Load", "pin": "pin"}, "Run the workflow first"),
        (routes.read_cancel, {"move": "1"}, "the id of a move"),
        (routes.read_cancel, {}, "missing: move"),
        (routes.read_nothing, {"models": "all"}, "unknown: models"),
        (routes.read_nothing, [], "an object"),
    ],
)
def test_a_wrong_body_is_refused_with_the_reason(
    host: FakeHost, read: Any, body: Any, reason: str
) -> None:
    with pytest.raises(routes.BadRequest, match=reason):
        read(body)


def test_park_restore_and_free_do_what_they_say(host: FakeHost, gpu: GPU) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    full = gpu.allocated()

    routes.read_park({"models": [adopted.number]})()
    assert gpu.allocated() == 0
    routes.read_restore({"models": "all"})()
    assert gpu.allocated() == full
    routes.read_free({"gib": 1024, "device": "cuda:0"})()
    assert gpu.allocated() == 0


def test_the_state_names_each_model_and_where_it_is_and_looking_changes_nothing(
    host: FakeHost, gpu: GPU
) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    nbytes = gpu.allocated()

    first, second = state.snapshot(), state.snapshot()
    residency.park([adopted])

    assert first == second | {
        "ram": first["ram"],
        "devices": first["devices"],
    }  # others use the machine meanwhile
    assert first["models"] == [
        {
            "id": adopted.number,
            "name": "Sequential",
            "place": "",
            "kind": "fp32",
            "nbytes": nbytes,
            "state": "resident",
            "busy": None,
            "resident": {"cuda:0": nbytes},
            "parked": {},
            "on_disk": 0,
            "lost": [],
            "home": ["cuda:0"],
            "last_used": None,
            "same": [],
            "pin": "unpin",
        }
    ]
    parked = state.snapshot()["models"][0]
    assert (parked["parked"], parked["home"], parked["nbytes"]) == (
        {"cuda:0": nbytes},
        ["cuda:0"],
        nbytes,
    )
    json.dumps(first)


def test_the_browser_is_told_when_a_model_has_moved_and_only_then(host: FakeHost) -> None:
    (adopted,) = residency.take_in([model := model_of(16)])
    events.send_if_changed()
    host.server.sent.clear()

    events.send_if_changed()
    assert host.server.sent == []
    qmove.park(model)
    events.send_if_changed()

    ((event, data),) = host.server.sent
    assert event == browser.STATE
    assert data["models"][0]["id"] == adopted.number
    assert data["models"][0]["state"] == "parked"


def test_a_button_pressed_while_a_node_runs_acts_when_it_has_ended(host: FakeHost) -> None:
    done: list[str] = []
    job_queue.node_begins()

    assert job_queue.run_or_queue(lambda: done.append("now")) == (False, None)
    assert done == []
    job_queue.node_ended()

    assert done == ["now"]
    assert job_queue.run_or_queue(lambda: "at once") == (True, "at once")


def test_of_a_job_that_waited_the_browser_is_told_the_result_or_why_there_is_none(
    host: FakeHost, guarded: Guarded
) -> None:
    guarded.expect("do what was asked for while a node ran")

    def fails() -> None:
        raise RuntimeError("too little RAM")

    job_queue.node_begins()
    job_queue.run_or_queue(lambda: "Parked it.")
    job_queue.run_or_queue(fails)
    host.server.sent.clear()
    job_queue.node_ended()

    assert [data for event, data in host.server.sent if event == browser.RESULT] == [
        {"report": "Parked it."},
        {"error": "too little RAM"},
    ]


def test_a_job_that_breaks_is_answered_with_the_reason_and_logged(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks() -> str:
        raise AttributeError("the host has no such thing")

    assert routes._run(breaks) == (
        500,
        {"error": "AttributeError: the host has no such thing. ComfyUI's log says more."},
    )
    assert "the host has no such thing" in caplog.text


def test_park_all_takes_what_is_there_when_its_turn_comes(host: FakeHost, gpu: GPU) -> None:
    job_queue.node_begins()
    assert routes._run(routes.read_park({"models": "all"}))[0] == 202
    residency.take_in([_model := model_of(16)])
    job_queue.node_ended()

    assert gpu.allocated() == 0
