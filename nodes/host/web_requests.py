"""What every route has in common: who may ask, how a body is read, and in which thread it acts."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import reprlib
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from . import comfy

MOST_BYTES = 1 << 16  # of a body; the longest there is lists the ids of all models
MOST_SHOWN = 100  # characters of what was sent, in an answer

Result = TypeVar("Result")

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother = 2, MOST_SHOWN, MOST_SHOWN
_short.maxlong = MOST_SHOWN


class BadRequest(ValueError):
    """The request does not fit the route; the message says why, `status` is HTTP's word for it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def echo(value: Any) -> str:
    """What was sent, for an error: a `repr` of bounded length and depth."""
    return _short.repr(value)


def names(values: Any) -> str:
    """Names that were sent, for an error: the first few, each of bounded length."""
    every = sorted(map(str, values))
    shown = [name if len(name) <= MOST_SHOWN else name[:MOST_SHOWN] + "…" for name in every[:5]]
    return ", ".join(shown) + (f" and {len(every) - 5} more" if len(every) > 5 else "")


def check_origin(headers: Mapping[str, str]) -> None:
    """Refuses what a page of another site sends: a browser posts for any page, also to loopback.

    Newer versions of ComfyUI check the same for all of their routes. Programs send no Origin and
    pass. A proxy may rewrite Host, so it is compared with Origin only where it is loopback and the
    browser does not say itself that the page is of the same origin.

    Raises:
        BadRequest: with the status 403.
    """
    origin = headers.get("Origin")
    if origin is not None and comfy.allowed_origin() in ("*", origin):
        return
    site = headers.get("Sec-Fetch-Site", "").strip().lower()  # no page can set or forge it
    if site in ("same-origin", "none"):
        return
    if site == "cross-site" or (origin is not None and not _may_be_same(origin, headers)):
        raise BadRequest(
            "qmove takes no requests from pages of other sites; ComfyUI's --enable-cors-header "
            "names one that may send them.",
            403,
        )


def _may_be_same(origin: str, headers: Mapping[str, str]) -> bool:
    asked, asking = _split("//" + headers.get("Host", "")), _split(origin)
    if asked is None:
        return False
    if not _is_loopback(asked.hostname or ""):
        return True
    if asking is None or asking.hostname != asked.hostname:
        return False
    return None in (asking.port, asked.port) or asking.port == asked.port


def _split(address: str) -> SplitResult | None:
    try:
        parts = urlsplit(address)
        _ = parts.port  # also raises
    except ValueError:  # brackets that do not match, or a port that is none
        return None
    return parts if parts.hostname else None


def _is_loopback(hostname: str) -> bool:
    """Also 0.0.0.0, which systems take to it. Names are not resolved: that would block the loop."""
    name = hostname.rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


async def read_json(request: Any) -> Any:
    """The JSON of an aiohttp request, of bounded size.

    Raises:
        BadRequest: it is too large, cut off, of another type, or no JSON.
    """
    from aiohttp import ClientError, web  # ComfyUI's own server runs on it

    too_large = BadRequest(f"the body must be at most {MOST_BYTES:,} bytes", 413)
    if (request.content_length or 0) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > MOST_BYTES:
                raise too_large
    except (web.RequestPayloadError, ClientError, OSError) as error:  # not gzip, or cut off
        raise BadRequest(f"the body cannot be read: {error}") from error
    kind = request.headers.get("Content-Type")
    if kind is not None and request.content_type != "application/json":
        raise BadRequest(
            f"send JSON, with the header Content-Type: application/json, not {echo(kind)}", 415
        )
    try:
        return json.loads(body, parse_constant=_no_constant)
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


class Workers:
    """Threads for what would hold up the server's loop, at most so many at once; the rest waits.

    asyncio's own executor is everybody's, and the end of the process waits for its threads. These
    are daemons: it does not.
    """

    def __init__(self, most: int) -> None:
        self._free = asyncio.Semaphore(most)

    async def run(self, act: Callable[[], Result]) -> Result:
        """What `act` returns or raises, in a thread. It goes on when the one who waits is gone."""
        await self._free.acquire()
        result: Future[Result] = Future()
        result.set_running_or_notify_cancel()
        waited_for = asyncio.wrap_future(result)
        waited_for.add_done_callback(lambda _: self._free.release())
        thread = threading.Thread(
            target=settle, args=(act, result), name="qmove request", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # a limit on threads
            result.set_exception(BadRequest(f"qmove cannot act now: {error}", 503))
        return await asyncio.shield(waited_for)


def settle(act: Callable[[], Result], result: Future[Result]) -> None:
    """Acts; what that gives or raises is the future's."""
    try:
        value = act()
    except BaseException as error:
        result.set_exception(error)
    else:
        result.set_result(value)
