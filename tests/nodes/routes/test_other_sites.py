"""A page of another site cannot move models or change settings; programs and proxies can."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
from qmove_pack.nodes.host import settings, web_requests

from tests.nodes.builders.http_routes import JSON, RoutesServer

pytestmark = pytest.mark.parametrize("host", ["new"], indirect=True)  # the routes are the same

HOME = "127.0.0.1:8188"

REFUSED = {
    "a page of another site": {"Origin": "https://evil.example", "Host": HOME},
    "the browser says so": {"Sec-Fetch-Site": "cross-site", "Host": HOME},
    "the browser says so, through a proxy": {
        "Sec-Fetch-Site": "Cross-Site",
        "Origin": "https://evil.example",
        "Host": "comfy.example",
    },
    "another port": {"Origin": "http://127.0.0.1:3000", "Host": HOME},
    "another port of the same site": {
        "Sec-Fetch-Site": "same-site",
        "Origin": "http://localhost:3000",
        "Host": "localhost:8188",
    },
    "a frame without an origin": {"Origin": "null", "Host": HOME},
    "a file": {"Origin": "file://", "Host": HOME},
    "no origin at all": {"Origin": "", "Host": HOME},
    "brackets": {"Origin": "http://[", "Host": HOME},
    "a port that is none": {"Origin": "http://127.0.0.1:99999999", "Host": HOME},
    "brackets in Host": {"Origin": "http://127.0.0.1:8188", "Host": "[::1"},
    "IPv6": {"Origin": "https://evil.example", "Host": "[::1]:8188"},
    "IPv4 in IPv6": {"Origin": "https://evil.example", "Host": "[::ffff:127.0.0.1]:8188"},
    "every address": {"Origin": "https://evil.example", "Host": "0.0.0.0:8188"},
    "localhost": {"Origin": "https://evil.example", "Host": "LOCALHOST.:8188"},
    "a name in localhost": {"Origin": "https://evil.example", "Host": "comfy.localhost:8188"},
    "the name as a part": {"Origin": "https://127.0.0.1.evil.example", "Host": HOME},
    "the name as a user": {"Origin": "https://127.0.0.1:8188@evil.example", "Host": HOME},
}
LET_IN = {
    "curl": {"Host": HOME},
    "the panel": {"Origin": f"http://{HOME}", "Sec-Fetch-Site": "same-origin", "Host": HOME},
    "a browser without Sec-Fetch-Site": {"Origin": f"http://{HOME}", "Host": HOME},
    "a browser without the port": {"Origin": "http://localhost", "Host": "localhost:8188"},
    "an address typed in": {"Sec-Fetch-Site": "none", "Host": HOME},
    "a proxy that keeps Host": {"Origin": "https://comfy.example", "Host": "comfy.example"},
    "a proxy that changes Host": {"Origin": "https://comfy.example", "Host": "10.0.0.2:8188"},
    "a proxy to loopback": {
        "Origin": "https://comfy.example",
        "Sec-Fetch-Site": "same-origin",
        "Host": HOME,
    },
    "IPv6": {"Origin": "http://[::1]:8188", "Host": "[::1]:8188"},
    "capitals": {"Origin": "http://LocalHost:8188", "Host": "localhost:8188"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_sites_are_refused(server: RoutesServer, case: str) -> None:
    before = settings.current()
    for path in server.posts:
        answer = server.ask(path, {settings.AUTO_PARK: False}, headers={**JSON, **REFUSED[case]})
        if answer.status == 400 and case == "brackets in Host":  # aiohttp is before us
            continue
        assert (answer.status, "other sites" in answer.error) == (403, True), (path, answer)
    assert settings.current() == before


@pytest.mark.parametrize("case", LET_IN)
def test_programs_proxies_and_our_own_page_are_let_in(server: RoutesServer, case: str) -> None:
    headers = {**JSON, **LET_IN[case]}
    assert server.ask("/qmove/settings", {settings.VERIFY: True}, headers=headers).status == 200
    assert settings.current()[settings.VERIFY] is True


@pytest.mark.parametrize("allowed", ["*", "https://front.example"])
def test_whom_comfyui_was_told_to_let_in_is_let_in(
    host: object, monkeypatch: pytest.MonkeyPatch, allowed: str
) -> None:
    arguments = ModuleType("comfy.cli_args")
    arguments.args = SimpleNamespace(enable_cors_header=allowed)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy.cli_args", arguments)
    headers = {"Origin": "https://front.example", "Sec-Fetch-Site": "cross-site", "Host": HOME}

    web_requests.check_origin(headers)

    if allowed != "*":
        with pytest.raises(web_requests.BadRequest, match="other sites"):
            web_requests.check_origin({**headers, "Origin": "https://evil.example"})
