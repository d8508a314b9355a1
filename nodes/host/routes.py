"""qmove over HTTP: state and settings for the browser, and moves on demand.

Every body is checked; no GET changes anything. `web_requests.py` is the way into each of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Set
from concurrent.futures import Future
from typing import Any

import torch

from qmove_core import QMoveError, for_hosts

from . import advice, browser, comfy, progress, settings, words
from .models import finding, node_models, pins
from .models.adopted import Adopted, adopted_models
from .panel import events, history, state
from .stages import idle, job_queue, lending, making_room, pinning, requests
from .web_requests import BadRequest, Workers, check_origin, echo, names, read_json

log = logging.getLogger("qmove")

Answer = tuple[int, Mapping[str, Any]]  # the HTTP status, and the JSON

MOST_ACTING = 4  # requests that move, or wait for a move, in threads at once; the rest queue up
MOST_LOOKING = 4  # requests that read the state


def install() -> bool:
    """Adds the routes to ComfyUI's server. Returns whether it has one."""
    server = comfy.server()
    if server is None:
        log.warning(
            "This ComfyUI has no server where qmove looks for it: no settings and no state in the "
            "browser."
        )
        return False
    from aiohttp import web  # ComfyUI's own server runs on it

    acting, looking = Workers(MOST_ACTING), Workers(MOST_LOOKING)

    async def answer(give: Callable[[], Awaitable[Answer]]) -> web.Response:
        try:
            status, body = await give()
        except BadRequest as error:
            status, body = error.status, {"error": str(error)}
        except Exception as error:
            status, body = _failed(error)
        return web.json_response(body, status=status)

    def add_get(path: str, look: Callable[[], Mapping[str, Any]]) -> None:
        async def give() -> Answer:
            return 200, await looking.run(look)

        @server.routes.get(path)
        async def get(request: web.Request) -> web.Response:
            words.follow_browser(request.headers.get("Accept-Language"))
            return await answer(give)

    def add_post(
        path: str, act: Callable[[Any], Answer | Future[Answer]], *, at_once: bool = False
    ) -> None:
        @server.routes.post(path)
        async def post(request: web.Request) -> web.Response:
            async def give() -> Answer:
                check_origin(request.headers)
                words.follow_browser(request.headers.get("Accept-Language"))
                body = await read_json(request)
                given = act(body) if at_once else await acting.run(lambda: act(body))
                if isinstance(given, Future):  # it waits for a node, and holds no thread meanwhile
                    given = await asyncio.shield(asyncio.wrap_future(given))
                return given

            return await answer(give)

    add_get("/qmove/state", _state)
    add_get("/qmove/settings", settings.current)
    add_get("/qmove/history", lambda: {"run": history.last_run()})
    add_post("/qmove/settings", _change_settings)
    add_post("/qmove/cancel", _cancel, at_once=True)
    add_post("/qmove/park", lambda body: _run(read_park(body)))
    add_post("/qmove/restore", lambda body: _run(read_restore(body)))
    add_post("/qmove/pin", lambda body: _run(read_pin(body)))
    add_post("/qmove/free", lambda body: _run(making_room.or_fail(read_free(body))))
    add_post("/qmove/unload", lambda body: _run(read_unload(body)))
    add_post("/qmove/release", _release)
    add_post("/qmove/take_back", _take_back)
    return True


def read_park(body: Any) -> Callable[[], str]:
    """`{"models": [1, 2]}`, `{"models": "all"}`, or those of `{"node": "5", "class": "Load"}`.

    With a node there may be `"workflow"`, the id of the one that it is of.
    """
    if isinstance(body, dict) and "node" in body:
        found = _models_of_node(_object(body, {"node", "class"}, {"workflow"}))
        return lambda: requests.park_value(found)
    wanted = _object(body, {"models"})["models"]
    if wanted == "all":
        return requests.park_all
    models = _models(wanted)
    return lambda: "\n".join(requests.park_models([model]) for model in models)


def read_restore(body: Any) -> Callable[[], str]:
    """As for park, and `"device"`: "home" (also when it is left out) or one of the machine's."""
    by_node = isinstance(body, dict) and "node" in body
    optional = {"device", "workflow"} if by_node else {"device"}
    body = _object(body, {"node", "class"} if by_node else {"models"}, optional)
    device = _device(body.get("device", requests.HOME), requests.HOME) or requests.HOME
    if by_node:
        found = _models_of_node(body)
        return lambda: requests.restore_value(found, device)
    if body["models"] == "all":
        return lambda: requests.restore_all(device)
    models = _models(body["models"])
    return lambda: requests.restore_models(models, device)


def read_pin(body: Any) -> Callable[[], str]:
    """As for park, and `"pin"`: "pin", "unpin", "forget", or the device to keep the models on."""
    by_node = isinstance(body, dict) and "node" in body
    required = {"node", "class", "pin"} if by_node else {"models", "pin"}
    body = _object(body, required, {"workflow"} if by_node else set())
    choice = body["pin"]
    if not isinstance(choice, str) or choice not in pins.choices():
        raise BadRequest(f"pin is one of {', '.join(pins.choices())}, not {echo(choice)}")
    if by_node:
        found = _models_of_node(body)
        return lambda: pinning.pin_value(found, choice)
    models = _models(body["models"])
    return lambda: pinning.pin_models(models, choice)


def read_free(body: Any) -> Callable[[], making_room.Room]:
    """`{"gib": 4.5}`: how many are free afterwards; and `"device"`: one of the machine's, each one
    if it is left out."""
    body = _object(body, {"gib"}, {"device"})
    gib, device = body["gib"], _device(body.get("device"), None)
    if isinstance(gib, bool) or not isinstance(gib, (int, float)) or not 0 < gib <= 1024:
        raise BadRequest(f"gib is a number of GiB above 0, up to 1024, not {echo(gib)}")
    return lambda: making_room.free(int(gib * 2**30), device)


def read_unload(body: Any) -> Callable[[], str]:
    """`{"comfyui_models": [1, 2]}`: ComfyUI's own models, by their ids in the state."""
    numbers = _object(body, {"comfyui_models"})["comfyui_models"]
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise BadRequest("comfyui_models is a list of ids from /qmove/state")
    found = state.hosts_own_of(numbers)
    if len(found) < len(set(numbers)):
        raise BadRequest("no such model of ComfyUI's own, or it is unloaded already")
    return lambda: requests.park_models([], found)


def read_nothing(body: Any) -> None:
    """`{}`: there is nothing to choose."""
    if _object(body):
        raise BadRequest(f"unknown: {names(body)}; send {{}}")


def read_cancel(body: Any) -> int:
    """`{"move": 7}`: the id of a move from the state or its event."""
    number = _object(body, {"move"})["move"]
    if type(number) is not int or not 0 < number < 2**53:
        raise BadRequest(f"move is the id of a move, not {echo(number)}")
    return number


def _cancel(body: Any) -> Answer:
    number = read_cancel(body)
    try:
        return 200, {"cancelled": progress.cancel(number)}
    except progress.NoSuchMove as error:
        return 409, {"error": str(error)}


def _change_settings(body: Any) -> Answer:
    try:
        changed = settings.change(_object(body))
    except settings.InvalidSettings as error:
        raise BadRequest(str(error)) from error
    browser.send(browser.SETTINGS, changed)
    idle.watch.follow_setting()
    return 200, changed


def _release(body: Any) -> Future[Answer]:
    """Answers when the VRAM is free, also where a node has to end first."""
    read_nothing(body)

    def release() -> Answer:
        released = lending.release()
        return 409 if "error" in released else 200, released

    return job_queue.run_when_free(lambda: _answer_of(release))


def _take_back(body: Any) -> Answer:
    """Answers at once; what moves then is in the state and in its events."""
    read_nothing(body)
    answer = lending.take_back()
    return 202 if answer["began"] else 200, answer


def _state() -> Mapping[str, Any]:
    """The state; who asks for it gets what changes from now on."""
    events.watch()
    if not settings.auto_park() and not progress.running():
        job_queue.run_if_free(finding.look)  # what no wire carries is shown too
    return state.snapshot()


def _run(job: Callable[[], str]) -> Answer:
    def run() -> Answer:
        has_run, report = job_queue.run_or_queue(job)
        if has_run:
            return 200, {"report": report}
        queued = words.say("A node is running; this is done as soon as it has ended.")
        return 202, {"report": queued}

    return _answer_of(run)


def _answer_of(act: Callable[[], Answer]) -> Answer:
    """What `act` answers, or why it cannot."""
    try:
        return act()
    except progress.Cancelled as cancelled:
        return 409, {"error": str(cancelled), "cancelled": True}
    except (QMoveError, torch.OutOfMemoryError) as error:
        return 409, advice.told(error)
    except Exception as error:
        return _failed(error)
    finally:
        events.send_if_changed()


def _failed(error: Exception) -> Answer:
    log.error("a request from the browser has failed", exc_info=error)
    return 500, {"error": f"{type(error).__name__}: {error}. ComfyUI's log says more."}


def _object(
    body: Any, required: Set[str] = frozenset(), optional: Set[str] = frozenset()
) -> dict[str, Any]:
    """The body, checked to be an object with these keys; any keys where none are named."""
    if not isinstance(body, dict):
        raise BadRequest(f"the body must be an object, not {type(body).__name__}")
    unknown, missing = body.keys() - required - optional, required - body.keys()
    if required and unknown:
        raise BadRequest(f"unknown: {names(unknown)}")
    if missing:
        raise BadRequest(f"missing: {names(missing)}")
    return body


def _models(numbers: Any) -> list[Adopted]:
    known = {adopted.number: adopted for adopted in adopted_models()}
    if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
        raise BadRequest('models is "all" or a list of ids from /qmove/state')
    gone = [number for number in numbers if number not in known]
    if gone:
        raise BadRequest(f"no such model, or it is gone: {names(gone)}")
    return [known[number] for number in numbers]


def _models_of_node(body: dict[str, Any]) -> list[Any]:
    node_id, class_name = body["node"], body["class"]
    if not isinstance(node_id, str) or not isinstance(class_name, str):
        raise BadRequest("node is the id of a node, class its type; both are strings")
    workflow = body.get("workflow")
    if workflow is not None and not isinstance(workflow, str):
        raise BadRequest("workflow is the id of a workflow, a string")
    found = node_models.models_of(node_id, class_name, workflow)
    if not found:
        raise BadRequest(
            f"Node {names([node_id])} ({names([class_name])}) has no model that is still there. "
            "Run the workflow first."
        )
    return found


def _device(name: Any, otherwise: str | None) -> str | None:
    known = for_hosts.known_devices()
    if name != otherwise and (not isinstance(name, str) or name not in known):
        raise BadRequest(f"there is no device {echo(name)}; this machine has {', '.join(known)}")
    return name
