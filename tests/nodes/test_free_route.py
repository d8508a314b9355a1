"""`POST /qmove/free`: so many GiB are free afterwards, or it is no success."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from qmove_pack.nodes.host import browser
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.stages import job_queue

import qmove_core as qmove
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.http_routes import RoutesServer, served


@pytest.fixture
def server(host: FakeHost) -> Iterator[RoutesServer]:
    with served(host) as running:
        yield running


@pytest.mark.simulated
def test_to_free_less_than_was_asked_for_is_no_success(
    host: FakeHost, server: RoutesServer
) -> None:
    (adopted,) = residency.take_in([model := model_of(16)])

    for gib, status in ((1024, 409), (0.01, 200)):
        residency.bring_home([adopted])
        answer = server.ask("/qmove/free", {"gib": gib, "device": "cuda:0"})

        assert answer.status == status
        said = json.loads(answer.body)["report" if status == 200 else "error"]
        assert said.startswith("cuda:0: ")
        assert ("less than the 1.00 TiB asked for" in said) == (status == 409)
        assert qmove.is_parked(model) == (status == 409)  # all that could leave has left


@pytest.mark.simulated
def test_a_request_to_free_that_waited_for_a_node_and_freed_less_reaches_the_browser_as_an_error(
    host: FakeHost, server: RoutesServer
) -> None:
    residency.take_in([model := model_of(16)])
    job_queue.node_begins()
    assert server.ask("/qmove/free", {"gib": 1024}).status == 202
    job_queue.node_ended()

    (result,) = [data for event, data in host.server.sent if event == browser.RESULT]
    assert "less than the 1.00 TiB asked for" in result["error"]
    assert qmove.is_parked(model)
