"""The routes in a server of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.http_routes import RoutesServer, served


@pytest.fixture
def server(host: FakeHost, caplog: pytest.LogCaptureFixture) -> Iterator[RoutesServer]:
    """No request may end in an error that nobody expected: the log has none."""
    with served(host) as running:
        yield running
    # aiohttp logs itself that a body was no gzip; what it cannot handle of ours is a 500.
    ours = [record for record in caplog.records if record.name != "aiohttp.server"]
    assert not [record.getMessage() for record in ours if record.levelno >= logging.ERROR]
