"""A move that a button asked for shows in the browser while it runs, and can be cancelled: the
model is where it was."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from qmove_pack.nodes.host import browser, progress, routes
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.panel import state
from qmove_pack.nodes.host.stages import job_queue

import qmove_core as qmove
from qmove_core import homes
from tests.builders.device import GPU
from tests.builders.snapshots import snapshot
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.fake_host import FakeHost


def moves_of(host: FakeHost) -> list[dict[str, Any]]:
    return [data for event, data in host.server.sent if event == browser.MOVE]


def cancel_each(host: FakeHost, monkeypatch: pytest.MonkeyPatch, number: int = 1) -> list[str]:
    """The user cancels the `number`th move as soon as the browser shows it; returns what was
    cancelled."""
    cancelled: list[str] = []
    send, seen = host.server.send_sync, set()

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.MOVE and data["state"] == "running":
            seen.add(data["id"])
            if len(seen) == number and not cancelled:
                cancelled.append(progress.cancel(data["id"]))

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    return cancelled


def test_a_park_tells_the_browser_how_far_it_is(host: FakeHost) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    host.server.sent.clear()

    assert routes._run(routes.read_park({"models": [adopted.number]}))[0] == 200

    first, *_between, last = moves_of(host)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    assert (first["verb"], first["name"], first["model"]) == ("park", "Sequential", adopted.number)
    assert (first["state"], first["done"], first["cancel"], first["node"]) == (
        "running",
        0,
        "move",
        None,
    )
    assert (last["state"], last["done"], last["total"], last["nbytes"]) == (
        "done",
        nbytes,
        nbytes,
        nbytes,
    )
    assert last["bytes_per_second"] > 0
    assert last["cancel"] is None


def test_a_cancelled_park_leaves_the_model_where_it_was(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    before, full = snapshot(model), gpu.allocated()
    cancelled = cancel_each(host, monkeypatch)

    status, answer = routes._run(routes.read_park({"models": [adopted.number]}))

    assert (status, answer["cancelled"], cancelled) == (409, True, ["move"])
    assert snapshot(model) == before
    assert not qmove.is_parked(model)
    assert gpu.allocated() == full
    assert moves_of(host)[-1]["state"] == "cancelled"
    assert progress.running() == []
    assert (
        routes._run(routes.read_park({"models": [adopted.number]}))[0] == 200
    )  # the next one is not cancelled
    assert qmove.is_parked(model)


def test_a_cancelled_restore_leaves_the_model_parked_and_it_comes_home_later(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16)
    before = snapshot(model)
    adopted = residency.take_in([model])
    residency.park(adopted)
    cancel_each(host, monkeypatch)

    status, answer = routes._run(routes.read_restore({"models": "all"}))

    assert (status, answer["cancelled"]) == (409, True)
    assert gpu.allocated() == 0
    assert qmove.is_parked(model)
    assert host.management.current_loaded_models == []
    assert routes._run(routes.read_restore({"models": "all"}))[0] == 200
    assert snapshot(model) == before


def test_to_cancel_one_of_several_keeps_those_that_were_done(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [model_of(16), model_of(16), model_of(16)]
    for number, model in enumerate(models):  # the same weights twice are not copied twice
        for parameter in model.parameters():
            parameter.data.add_(number)
    residency.take_in(models)
    cancel_each(host, monkeypatch, number=2)

    status, _answer = routes._run(routes.read_park({"models": "all"}))

    assert status == 409
    assert [qmove.is_parked(model) for model in models] == [True, False, False]


def test_a_move_that_a_node_needs_is_cancelled_as_comfyui_does_it(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    cancelled = cancel_each(host, monkeypatch)

    with host.node_runs("7"), pytest.raises(host.management.InterruptProcessingException):
        residency.park([adopted])

    assert cancelled == ["prompt"]
    assert not qmove.is_parked(model)


def test_what_comfyui_itself_unloads_cannot_be_cancelled(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency.take_in([model := model_of(16)])
    refused: list[str] = []
    send = host.server.send_sync

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.MOVE and data["state"] == "running":
            with pytest.raises(progress.NoSuchMove) as error:
                progress.cancel(data["id"])
            refused.append(str(error.value))

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    host.management.unload_all_models()

    assert refused
    assert qmove.is_parked(model)


def test_a_move_that_has_ended_is_not_there_to_cancel(host: FakeHost) -> None:
    residency.park(residency.take_in([_model := model_of(16)]))

    with pytest.raises(progress.NoSuchMove, match="is not running"):
        progress.cancel(moves_of(host)[-1]["id"])


def test_a_job_that_waited_can_be_cancelled_and_the_browser_is_told(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    cancel_each(host, monkeypatch)
    job_queue.node_begins()
    assert routes._run(routes.read_park({"models": [adopted.number]}))[0] == 202

    job_queue.node_ended()

    (result,) = [data for event, data in host.server.sent if event == browser.RESULT]
    assert result["cancelled"] is True
    assert not qmove.is_parked(model)


def test_while_a_model_moves_the_state_says_busy_and_nobody_waits_for_the_move(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second thread asks while the first one holds the core's lock."""
    (adopted,) = residency.take_in([_model := model_of(16)])
    state.snapshot()
    answers: list[dict[str, Any]] = []
    send = host.server.send_sync

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.MOVE and data["state"] == "running" and data["done"]:
            asker = threading.Thread(target=lambda: answers.append(state.snapshot()))
            asker.start()
            asker.join(60)

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    routes._run(routes.read_park({"models": [adopted.number]}))

    assert answers, "the state waited for the move"
    (model,) = answers[0]["models"]
    assert (model["state"], model["busy"]) == ("busy", "park")
    assert [move["model"] for move in answers[0]["moves"]] == [adopted.number]


def test_who_looks_while_another_thread_looks_waits_for_it_and_gets_no_old_picture(
    host: FakeHost,
) -> None:
    state.snapshot()
    answers: list[dict[str, Any]] = []
    asker = threading.Thread(target=lambda: answers.append(state.snapshot()))

    with homes.lock:
        asker.start()
        asker.join(0.3)  # it cannot be done yet; an old picture would be there by now
        (adopted,) = residency.take_in([_model := model_of(16)])
    asker.join(60)

    assert [model["id"] for model in answers[0]["models"]] == [adopted.number]
