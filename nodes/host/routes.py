"""The HTTP face of qmove: state and settings for the browser, and moves on demand.

Every body is checked; no GET changes anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from qmove_core import devices
from qmove_core.errors import QMoveError

from . import comfy, events, jobs, moves, settings, state
from .adopted import Adopted, adopted_models

log = logging.getLogger("qmove")


class BadRequest(ValueError):
    """What was sent is not what the route takes; the message says why."""


def install() -> bool:
    """Adds the routes to the host's server. Returns whether it has one."""
    server = comfy.server()
    if server is None:
        log.warning("This ComfyUI has no server where qmove looks for it: no settings and no state in the browser.")
        return False
    from aiohttp import web  # the host's own server runs on it

    def answer(status: int, body: Mapping[str, Any]) -> web.Response:
        return web.json_response(body, status=status)

    async def body_of(request: web.Request) -> Any:
        try:
            return await request.json()
        except ValueError as error:
            raise BadRequest(f"the body is no JSON: {error}") from error

    @server.routes.get("/qmove/state")
    async def get_state(request: web.Request) -> web.Response:
        return answer(200, await asyncio.to_thread(state.snapshot))

    @server.routes.get("/qmove/settings")
    async def get_settings(request: web.Request) -> web.Response:
        return answer(200, settings.current())

    @server.routes.post("/qmove/settings")
    async def post_settings(request: web.Request) -> web.Response:
        try:
            changed = settings.change(_object(await body_of(request)))
        except (BadRequest, settings.InvalidSettings) as error:
            return answer(400, {"error": str(error)})
        events.send(events.SETTINGS, changed)
        return answer(200, changed)

    def add_move(path: str, read: Callable[[Any], Callable[[], str]]) -> None:
        @server.routes.post(path)
        async def post_move(request: web.Request) -> web.Response:
            try:
                job = read(await body_of(request))
            except (BadRequest, QMoveError) as error:
                return answer(400, {"error": str(error)})
            return answer(*await asyncio.to_thread(_run, job))

    add_move("/qmove/park", read_park)
    add_move("/qmove/restore", read_restore)
    add_move("/qmove/free", read_free)
    return True


def read_park(body: Any) -> Callable[[], str]:
    """`{"models": [1, 2]}` or `{"models": "all"}`."""
    models = _models(_object(body, required={"models"})["models"])
    return lambda: moves.park_models(models)


def read_restore(body: Any) -> Callable[[], str]:
    """As for park, and `"device"`: "home" (also when it is left out) or one of the machine's."""
    body = _object(body, required={"models"}, optional={"device"})
    models, device = _models(body["models"]), _device(body.get("device", moves.HOME), moves.HOME)
    return lambda: moves.restore_models(models, device or moves.HOME)


def read_free(body: Any) -> Callable[[], str]:
    """`{"gib": 4.5}`, and `"device"`: one of the machine's, all if it is left out."""
    body = _object(body, required={"gib"}, optional={"device"})
    gib, device = body["gib"], _device(body.get("device"), None)
    if isinstance(gib, bool) or not isinstance(gib, (int, float)) or not 0 < gib <= 1024:
        raise BadRequest(f"gib is a number of GiB above 0, up to 1024, not {gib!r}")
    return lambda: moves.free_vram(int(gib * 2**30), device)


def _run(job: Callable[[], str]) -> tuple[int, dict[str, Any]]:
    try:
        has_run, report = jobs.run_or_queue(job)
    except QMoveError as error:
        return 409, {"error": str(error)}
    finally:
        events.send_if_changed()
    if has_run:
        return 200, {"report": report}
    return 202, {"report": "A node is running; this is done as soon as it has ended."}


def _object(body: Any, required: set[str] = frozenset(), optional: set[str] | None = None) -> dict[str, Any]:  # type: ignore[assignment]
    """The body, checked to be an object with these keys; any keys where none are named."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body is to be an object, not {type(body).__name__}")
    if required:
        unknown = body.keys() - required - (optional or set())
        if unknown:
            raise BadRequest(f"unknown: {', '.join(sorted(unknown))}")
        missing = required - body.keys()
        if missing:
            raise BadRequest(f"missing: {', '.join(sorted(missing))}")
    return body


def _models(numbers: Any) -> list[Adopted]:
    known = {adopted.number: adopted for adopted in adopted_models()}
    if numbers == "all":
        return list(known.values())
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise BadRequest('models is "all" or a list of ids from /qmove/state')
    gone = [str(number) for number in numbers if number not in known]
    if gone:
        raise BadRequest(f"no such model, or it is gone: {', '.join(gone)}")
    return [known[number] for number in numbers]


def _device(name: Any, otherwise: str | None) -> str | None:
    if name == otherwise:
        return otherwise
    if not isinstance(name, str) or name not in devices.known():
        raise BadRequest(f"there is no device {name!r}; this machine has {', '.join(devices.known())}")
    return name
