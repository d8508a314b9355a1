"""qmove's routes in a server of their own on loopback, and requests to them byte by byte."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from qmove_pack.nodes.host import routes

from tests.nodes.builders.fake_host import FakeHost

JSON = {"Content-Type": "application/json"}
SECONDS = 60  # that an answer may take; it hangs otherwise


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The reason of a refusal, which is JSON and short."""
        assert 400 <= self.status < 500, (self.status, self.body[:500])
        assert self.headers["Content-Type"].startswith("application/json"), self.body[:500]
        error = json.loads(self.body)["error"]
        assert isinstance(error, str) and 0 < len(error) < 2000
        assert "Traceback" not in error
        return error


class RoutesServer:
    """Attributes:
    gets, posts: the paths of all routes that qmove has.
    loop: of the server.
    """

    def __init__(self, host: FakeHost, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        table = web.RouteTableDef()
        host.server.routes = table  # type: ignore[attr-defined]
        assert routes.install()
        every = [route for route in table if isinstance(route, web.RouteDef)]
        self.gets = sorted(route.path for route in every if route.method == "GET")
        self.posts = sorted(route.path for route in every if route.method == "POST")
        self._app = web.Application(client_max_size=1 << 30)  # as large as ComfyUI's
        self._app.add_routes(table)
        self.port = 0

    async def start(self) -> web.AppRunner:
        runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.port = runner.addresses[0][1]
        return runner

    def ask(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        raw: Any = None,
        headers: Mapping[str, str] = JSON,
    ) -> Answer:
        """The answer to `body` as JSON, or to the bytes `raw` (or to an iterable of them, in
        chunks)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            sent = json.dumps(body).encode() if raw is None and method == "POST" else raw
            connection.request(method, path, sent, dict(headers))
            got = connection.getresponse()
            return Answer(got.status, dict(got.getheaders()), got.read())
        finally:
            connection.close()


@contextmanager
def served(host: FakeHost) -> Iterator[RoutesServer]:
    """A server whose loop runs in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
    thread.start()
    server = RoutesServer(host, loop)
    runner = asyncio.run_coroutine_threadsafe(server.start(), loop).result(SECONDS)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
