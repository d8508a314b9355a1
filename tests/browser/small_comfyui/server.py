"""`server.PromptServer.instance` over aiohttp: routes for the packs to add to, and events to the
browsers."""

from __future__ import annotations

import asyncio
import json
import struct
import uuid
from typing import Any

from aiohttp import WSMsgType, web

TEXT_EVENT = 3  # the number of "a text for a node" among ComfyUI's binary events
FEATURES = {"supports_preview_metadata": True, "max_upload_size": 100 << 20}


class Server:
    """What packs and prompts see of the server. `send_sync` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.routes = web.RouteTableDef()
        self.client_id: str | None = None
        self.last_node_id: str | None = None
        self.prompt_queue: Any = None
        self._loop = loop
        self.sockets: dict[str, web.WebSocketResponse] = {}

    def add_to(self, application: web.Application) -> None:
        """Adds the websocket and all routes that packs have added, bare and under /api, as ComfyUI
        does."""
        for prefix in ("", "/api"):
            application.router.add_get(f"{prefix}/ws", self._websocket)
            for route in self.routes:
                assert isinstance(route, web.RouteDef)
                application.router.add_route(
                    route.method, prefix + route.path, route.handler, **route.kwargs
                )

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        text = json.dumps({"type": event, "data": data})
        self._loop.call_soon_threadsafe(lambda: self._start(self._send(text, sid)))

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        node = str(node_id).encode()
        message = struct.pack(">II", TEXT_EVENT, len(node)) + node + text.encode()
        self._loop.call_soon_threadsafe(lambda: self._start(self._send(message, sid)))

    def _start(self, sending: Any) -> None:
        task = self._loop.create_task(sending)
        _running.add(task)
        task.add_done_callback(_running.discard)

    async def _send(self, message: str | bytes, sid: str | None) -> None:
        sockets = (
            list(self.sockets.values())
            if sid is None
            else [s for s in [self.sockets.get(sid)] if s]
        )
        for socket in sockets:
            if not socket.closed:
                await (
                    socket.send_str(message)
                    if isinstance(message, str)
                    else socket.send_bytes(message)
                )

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        sid = request.query.get("clientId") or uuid.uuid4().hex
        self.sockets[sid] = socket
        status = {"exec_info": {"queue_remaining": self.prompt_queue.remaining()}}
        await socket.send_json({"type": "status", "data": {"status": status, "sid": sid}})
        try:
            async for message in socket:
                if message.type == WSMsgType.TEXT and message.json().get("type") == "feature_flags":
                    await socket.send_json({"type": "feature_flags", "data": FEATURES})
        finally:
            if self.sockets.get(sid) is socket:
                del self.sockets[sid]
        return socket


_running: set[asyncio.Task[None]] = set()  # the loop itself holds its tasks weakly
