"""The picture is true while it matters: during a move, with auto-parking off, of the right node."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
from qmove_pack.nodes.host import browser, comfy, routes, settings
from qmove_pack.nodes.host.models import node_models, residency
from qmove_pack.nodes.host.models.adopted import adopted_models
from qmove_pack.nodes.host.panel import events, state

import qmove_core as qmove
from qmove_core import homes
from tests.builders.device import GPU
from tests.builders.threads import in_threads
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import model_of, node
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

PROMPT = {
    "load": node("Load", mib=16, shape="plain"),
    "use": node("Use", model=("load", 0), seed=1),
}


@pytest.fixture(autouse=True)
def _nodes(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    careless_nodes.forget_all()
    monkeypatch.setattr(node_models, "_by_node", {})
    monkeypatch.setattr(state, "_last", None)
    host.add(*careless_nodes.ALL)


def test_who_looks_in_the_middle_of_a_move_sees_each_model_and_what_is_free_now(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that no picture had before."""
    residency.take_in([first := model_of(16)])
    seen: list[dict[str, Any]] = []
    send = host.server.send_sync

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.MOVE and data["state"] == "running" and not seen:
            seen.extend(in_threads(lambda: state.snapshot(quick=True), count=1))

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    with homes.lock:
        residency.park(residency.idle_models([]))

    (picture,) = seen
    assert [(m["name"], m["state"], m["busy"]) for m in picture["models"]] == [
        ("Sequential", "busy", "park")
    ]
    total = sum(parameter.nbytes for parameter in first.parameters())
    device = next(d for d in picture["devices"] if d["name"] == "cuda:0")
    assert sum(picture["models"][0]["resident"].values()) == total
    assert device["total"] - device["free"] >= total


def test_a_thread_sends_what_changes_while_a_browser_is_connected(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = threading.Event()
    monkeypatch.setattr(events, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(comfy.server(), "sockets", {"tab": object()}, raising=False)
    residency.take_in([model := model_of(16)])
    events.send_if_changed()
    events.watch()
    send = host.server.send_sync

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.STATE and data["models"][0]["state"] == "parked":
            sent.set()

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    qmove.park(model)  # nobody tells the panel
    assert sent.wait(30)
    host.server.sockets.clear()  # type: ignore[attr-defined]
    while events._watching:
        threading.Event().wait(0.01)


def test_with_auto_parking_off_models_are_listed_and_left_where_they_are(
    host: FakeHost, gpu: GPU
) -> None:
    settings.change({settings.AUTO_PARK: False})
    host.run(PROMPT)

    (model,) = state.snapshot()["models"]
    assert model["state"] == "resident"
    assert host.management.current_loaded_models == []
    host.management.free_memory(1e30, gpu.device)
    assert state.snapshot()["models"][0]["state"] == "resident"
    assert routes._run(routes.read_park({"models": [model["id"]]}))[0] == 200
    assert gpu.allocated() == 0


def test_when_it_is_turned_on_what_was_only_shown_can_leave(host: FakeHost, gpu: GPU) -> None:
    settings.change({settings.AUTO_PARK: False})
    host.run(PROMPT)
    settings.change({settings.AUTO_PARK: True})

    host.management.free_memory(1e30, gpu.device)
    assert gpu.allocated() == 0


def test_comfyuis_own_are_listed_and_unloaded_by_comfyui(host: FakeHost) -> None:
    patcher = ModelPatcher(model_of(16))
    host.management.load_models_gpu([patcher])
    (own,) = state.snapshot()["comfyui_models"]
    assert (own["nbytes"], own["device"]) == (patcher.model_size(), "cuda:0")

    status, answer = routes._run(routes.read_unload({"comfyui_models": [own["id"]]}))
    assert (status, patcher.loaded_size()) == (200, 0)
    assert "ComfyUI unloaded" in answer["report"]
    assert not qmove.is_parked(patcher.model)
    with pytest.raises(routes.BadRequest, match="no such model"):
        routes.read_unload({"comfyui_models": [own["id"]]})


@pytest.mark.parametrize("body", [{}, {"comfyui_models": "all"}, {"comfyui_models": [True]}])
def test_what_is_no_list_of_their_ids_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(routes.BadRequest):
        routes.read_unload(body)


def run_as(host: FakeHost, workflow: str, prompt: dict[str, Any]) -> None:
    """Runs a prompt that the frontend has queued from this workflow."""
    extra = {"extra_pnginfo": {"workflow": {"id": workflow}}}
    item = (0, "prompt", prompt, extra, [])
    host.server.prompt_queue = SimpleNamespace(  # type: ignore[attr-defined]
        currently_running={0: item}
    )
    host.run(prompt)


def test_the_same_id_in_another_workflow_is_another_node(host: FakeHost, gpu: GPU) -> None:
    titled = PROMPT["load"] | {"_meta": {"title": "First"}}
    run_as(host, "w1", PROMPT | {"load": titled})
    first = adopted_models()[0].model
    other = node("Load", mib=24, shape="plain") | {"_meta": {"title": "Second"}}
    run_as(host, "w2", {"load": other, "again": node("Use", model=("load", 0), seed=2)})
    second = next(m.model for m in adopted_models() if m.model is not first)

    menus = {(menu["workflow"], menu["title"]) for menu in state.snapshot()["menus"]}
    assert {("w1", "First"), ("w2", "Second")} <= menus
    park = routes.read_park({"node": "load", "class": "Load", "workflow": "w1"})
    assert routes._run(park)[0] == 200
    assert (qmove.is_parked(first), qmove.is_parked(second)) == (True, False)
    with pytest.raises(routes.BadRequest, match="has no model"):
        routes.read_park({"node": "load", "class": "Load", "workflow": "w3"})


def test_only_what_can_be_done_is_offered(host: FakeHost) -> None:
    host.run(PROMPT)

    def offered() -> list[str]:
        (menu,) = [menu for menu in state.snapshot()["menus"] if menu["node"] == "load"]
        return list(menu["can"])

    assert offered() == ["park", "pin"]
    (model,) = state.snapshot()["models"]
    routes._run(routes.read_park({"models": [model["id"]]}))
    assert offered() == ["pin", "restore"]
    routes._run(routes.read_pin({"models": [model["id"]], "pin": "pin"}))
    assert offered() == ["unpin"]
