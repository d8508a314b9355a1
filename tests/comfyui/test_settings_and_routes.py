"""The switch: defaults, what ComfyUI has stored, what the routes take, and what they tell the browser."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from qmove_pack.nodes.host import events, jobs, residency, routes, settings, state

import qmove_core as qmove
from conftest import GPU

from .careless_nodes import model_of
from .fake_host import FakeHost


def stored(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "default").mkdir()
    (folder / "default" / "comfy.settings.json").write_text(text)
    paths = ModuleType("folder_paths")
    paths.get_user_directory = lambda: str(folder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_paths", paths)


def test_it_is_on_and_parks_when_needed_unless_told_otherwise() -> None:
    assert settings.current() == {"qmove.autoPark": True, "qmove.autoParkWhen": "needed"}


def test_what_comfyui_has_stored_holds_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path, monkeypatch, json.dumps({"qmove.autoPark": False, "Comfy.Other": 1}))

    settings.load_stored()

    assert settings.current() == {"qmove.autoPark": False, "qmove.autoParkWhen": "needed"}


@pytest.mark.parametrize("text", ['{"qmove.autoPark": "yes"}', "no json", "[]"])
def test_a_stored_file_that_does_not_fit_is_told_and_the_defaults_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    monkeypatch.setattr("qmove_pack.nodes.host.guard._told", set())
    stored(tmp_path, monkeypatch, text)

    settings.load_stored()

    assert settings.current() == settings.DEFAULTS
    assert caplog.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qmove.unknown": 1}, "no setting of qmove"),
        ({"qmove.autoPark": 1}, "true or false"),
        ({"qmove.autoPark": None}, "true or false"),
        ({"qmove.autoParkWhen": "always"}, '"needed" or "stage"'),
        ({"qmove.autoParkWhen": ["needed"]}, '"needed" or "stage"'),
        ({"qmove.autoPark": False, "qmove.autoParkWhen": "always"}, "not"),
    ],
)
def test_a_wrong_setting_is_refused_with_the_reason_and_changes_nothing(changes: dict[str, Any], reason: str) -> None:
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
    ],
)
def test_a_wrong_body_is_refused_with_the_reason(host: FakeHost, read: Any, body: Any, reason: str) -> None:
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


def test_the_state_names_each_model_and_where_it_is_and_looking_changes_nothing(host: FakeHost, gpu: GPU) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    nbytes = gpu.allocated()

    first, second = state.snapshot(), state.snapshot()
    residency.park([adopted])

    assert first == second | {"ram": first["ram"], "devices": first["devices"]}  # others use the machine meanwhile
    assert first["models"] == [
        {"id": adopted.number, "name": "Sequential", "state": "resident", "resident": {"cuda:0": nbytes}, "parked": {}}
    ]
    assert state.snapshot()["models"][0]["parked"] == {"cuda:0": nbytes}
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
    assert event == "qmove.state"
    assert data["models"][0]["id"] == adopted.number
    assert data["models"][0]["state"] == "parked"


def test_a_button_pressed_while_a_node_runs_acts_when_it_has_ended(host: FakeHost) -> None:
    done: list[str] = []
    jobs.node_begins()

    assert jobs.run_or_queue(lambda: done.append("now")) == (False, None)
    assert done == []
    jobs.node_ended()

    assert done == ["now"]
    assert jobs.run_or_queue(lambda: "at once") == (True, "at once")
