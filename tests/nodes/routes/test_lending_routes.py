"""POST /qmove/release answers when the VRAM is free, POST /qmove/take_back at once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from qmove_pack.nodes.host import browser, routes
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.stages import auto_parking, job_queue, last_run

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders.careless_nodes import MIB, model_of
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.http_routes import RoutesServer

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.parametrize("host", ["new"], indirect=True),  # the routes are the same
]


def test_release_answers_with_figures_and_the_card_is_free(server: RoutesServer, gpu: GPU) -> None:
    residency.take_in([_model := model_of(16)])
    reserved = torch.cuda.memory_reserved(0)

    answer = server.ask("/qmove/release", {})

    assert answer.status == 200
    first = json.loads(answer.body)["devices"][0]
    assert (first["name"], first["freed"], first["held"]) == ("cuda:0", reserved, 0)
    assert first["free"] == torch.cuda.mem_get_info(0)[0]
    assert (gpu.allocated(), torch.cuda.memory_reserved(0)) == (0, 0)


def test_release_during_a_node_is_answered_after_it_has_ended(
    server: RoutesServer, gpu: GPU
) -> None:
    residency.take_in([model := model_of(16)])
    full = gpu.allocated()
    job_queue.node_begins()
    with ThreadPoolExecutor(1) as client:
        asked = client.submit(server.ask, "/qmove/release", {})
        while not job_queue._waiting:
            assert server.ask("/qmove/settings", method="GET").status == 200
        assert (asked.done(), gpu.allocated()) == (False, full)
        assert not qmove.is_parked(model)  # the node uses it

        job_queue.node_ended()

        answer = asked.result()
    assert answer.status == 200
    assert (gpu.allocated(), torch.cuda.memory_reserved(0)) == (0, 0)


def test_releases_that_wait_for_a_node_take_no_thread_from_other_requests(
    server: RoutesServer,
) -> None:
    residency.take_in([_model := model_of(16)])
    many = 2 * routes.MOST_ACTING
    job_queue.node_begins()
    with ThreadPoolExecutor(many) as clients:
        asked = [clients.submit(server.ask, "/qmove/release", {}) for _ in range(many)]
        while len(job_queue._waiting) < many:
            assert server.ask("/qmove/settings", {}).status == 200

        assert server.ask("/qmove/park", {"models": "all"}).status == 202
        assert not any(request.done() for request in asked)
        job_queue.node_ended()

        assert [request.result().status for request in asked] == [200] * many


def test_a_release_that_could_not_free_all_is_refused_with_the_figures(
    server: RoutesServer, gpu: GPU
) -> None:
    residency.take_in([_big := model_of(64)])
    qmove.configure(ram_limit=16 * MIB)

    answer = server.ask("/qmove/release", {})

    assert answer.status == 409
    assert "ram_limit" in answer.error
    (stayed,) = json.loads(answer.body)["devices"][0]["stayed"]
    assert stayed["nbytes"] == gpu.allocated()


def test_take_back_answers_at_once_and_goes_on(
    server: RoutesServer, host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    residency.take_in([model := model_of(16)])
    last_run.note(host, auto_parking.NodeInputs([adopted_of(model)]))
    full, home = gpu.allocated(), threading.Event()
    assert server.ask("/qmove/release", {}).status == 200
    send = host.server.send_sync

    def send_sync(event: str, data: object, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.RESULT:
            home.set()

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    with job_queue.lock:  # as while something else moves
        answer = server.ask("/qmove/take_back", {})
        assert answer.status == 202
        assert json.loads(answer.body)["began"][0]["nbytes"] == full
        assert gpu.allocated() == 0

    assert home.wait(60)
    assert gpu.allocated() == full


def test_take_back_during_a_node_begins_after_it(
    server: RoutesServer, host: FakeHost, gpu: GPU
) -> None:
    residency.take_in([model := model_of(16)])
    last_run.note(host, auto_parking.NodeInputs([adopted_of(model)]))
    full = gpu.allocated()
    assert server.ask("/qmove/release", {}).status == 200
    job_queue.node_begins()

    assert server.ask("/qmove/take_back", {}).status == 202
    while not job_queue._waiting:
        assert server.ask("/qmove/settings", method="GET").status == 200
    assert gpu.allocated() == 0
    job_queue.node_ended()

    assert gpu.allocated() == full


def test_with_nothing_away_take_back_says_so(server: RoutesServer) -> None:
    answer = server.ask("/qmove/take_back", {})

    assert (answer.status, json.loads(answer.body)["began"]) == (200, [])
