"""Stops the simulated link in the middle of a move until the test lets it go on: a slow move
without a clock."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from typing import Any

from aiohttp import web

import simcuda

SECONDS_AT_MOST = 60  # a test that failed meanwhile must not hold the server for ever


class Gate:
    """Lets copies over the link pass until so many bytes went through, then holds the next until it
    is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._left = 0
        self._held = 0
        self._hook = ExitStack()
        self._open.set()

    def close(self, after_bytes: int) -> None:
        self.open()
        self._left = after_bytes
        self._open.clear()
        self._hook.enter_context(simcuda.on_copy(self._copy))

    def open(self) -> None:
        self._open.set()
        self._hook.close()

    @property
    def held(self) -> int:
        """How many copies wait now."""
        return self._held

    def _copy(self, notice: simcuda.CopyNotice) -> None:
        if notice.direction == "d2d" or self._open.is_set():
            return
        self._left -= notice.nbytes
        if self._left >= 0:
            return
        self._held += 1
        try:
            self._open.wait(SECONDS_AT_MOST)
        finally:
            self._held -= 1


gate = Gate()


def add_routes(routes: Any) -> None:
    @routes.post("/stagehand/close_gate")
    async def close_gate(request: web.Request) -> web.Response:
        gate.close(int((await request.json())["after_bytes"]))
        return web.json_response({})

    @routes.post("/stagehand/open_gate")
    async def open_gate(request: web.Request) -> web.Response:
        gate.open()
        return web.json_response({})

    @routes.get("/stagehand/held")
    async def held(request: web.Request) -> web.Response:
        return web.json_response({"held": gate.held})
