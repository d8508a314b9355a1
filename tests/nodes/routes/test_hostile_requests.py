"""Requests that no browser of ours sends: each is refused with a reason, and changes nothing."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note
from hypothesis import settings as examples
from hypothesis import strategies as st
from qmove_pack.nodes.host import settings, web_requests
from qmove_pack.nodes.host.models import residency

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.http_routes import JSON, RoutesServer

pytestmark = pytest.mark.parametrize("host", ["new"], indirect=True)  # the routes are the same

DEEP = 10_000
MARKUP = "<img src=x onerror=alert(1)>"
KEYS = ["models", "node", "class", "device", "gib", "move", "pinned", *settings.DEFAULTS]

# Fit no key of any route.
BAD_VALUES: dict[str, Any] = {
    "null": None,
    "negative": -1,
    "huge": 10**4000,
    "huge float": 1e308,
    "text": "x",
    "no text": "",
    "long text": "x" * 20_000,
    "a path": "../../../../etc/passwd",
    "a path of Windows": "..\\..\\C:\\windows\\win.ini",
    "a network path": "\\\\host\\share",
    "escaped path": "%2e%2e%2f",
    "markup": MARKUP,
    "terminal escapes": "\x1b[2J\x1b]0;title\x07\0",
    "half a character": "\ud800",
    "a list of nothing": [None],
    "a list of lists": [[[[[1]]]]],
    "a list of true": [True],
    "numbers of nobody": [10**4000, -1, 10**9],
    "many numbers": list(range(10**6, 10**6 + 3000)),
    "no object": {},
    "an object": {"__proto__": {"a": 1}},
}


def _bad_objects() -> list[tuple[str, Any]]:
    """Bodies that are objects: every key with every bad value, alone and beside what fits."""
    found: list[tuple[str, Any]] = []
    for (name, value), key in itertools.product(BAD_VALUES.items(), KEYS):
        found.append((f"{key}: {name}", {key: value}))
    for name, value in BAD_VALUES.items():
        found += [
            (f"node and class: {name}", {"node": value, "class": value}),
            (f"a class that is {name}", {"node": "5", "class": value}),
            (f"unknown key: {name}", {"models": "all", "device": "cuda:0", str(value): 1}),
            (f"one setting fits, {name} not", {settings.VERIFY: True, settings.RAM_LIMIT: value}),
        ]
        if value is not None:  # as if it were left out
            found += [
                (f"a device that is {name}", {"models": "all", "device": value}),
                (f"GiB of a device that is {name}", {"gib": 1, "device": value}),
            ]
    found += [(f"{len(KEYS)} keys", dict.fromkeys(KEYS, 1))]
    return found


BAD_BYTES: dict[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"models": ',
    "no JSON": b"models=all",
    "no text": b"\xff\xfe\x00\xd8\x01",
    "zero bytes": b"\0" * 100,
    "NaN": b'{"gib": NaN}',
    "Infinity": b'{"qmove.ramLimit": Infinity}',
    "-Infinity": b'{"move": -Infinity}',
    "beyond a float": b'{"gib": 1e999}',
    "beyond the digits of an int": b'{"gib": ' + b"9" * 60_000 + b"}",
    "deep lists": b"[" * DEEP + b"]" * DEEP,
    "deep lists without an end": b"[" * 60_000,
    "deep objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    **{
        f"deep in {key}": b'{"%s":' % key.encode() + b"[" * DEEP + b"]" * DEEP + b"}"
        for key in KEYS
    },
    "null": b"null",
    "true": b"true",
    "a number": b"17",
    "a text": b'"all"',
    "a list": b'[{"models": "all"}]',
    "a template": b"{{7*7}}",
    "XML": b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
    "two objects": b"{}{}",
}


@pytest.fixture
def unchanged(gpu: GPU, server: RoutesServer) -> Any:
    """Checks at the end of the test that no request has moved or set anything."""
    model = model_of(1)
    residency.take_in([model])
    before = (gpu.allocated(), settings.current(), qmove.stats().moves)
    yield
    assert (gpu.allocated(), settings.current(), qmove.stats().moves) == before


def test_all_routes_are_tried(server: RoutesServer) -> None:
    named = {"settings", "cancel", "park", "restore", "pin", "free", "release", "take_back"}
    assert {f"/qmove/{name}" for name in named} <= set(server.posts)
    assert {"/qmove/state", "/qmove/settings", "/qmove/history"} <= set(server.gets)


def test_a_body_that_is_no_json_of_ours_is_refused(server: RoutesServer, unchanged: None) -> None:
    for path, (name, body) in itertools.product(server.posts, BAD_BYTES.items()):
        answer = server.ask(path, raw=body)
        assert answer.status == 400, (path, name, answer)
        assert answer.error


def test_an_object_that_does_not_fit_is_refused(server: RoutesServer, unchanged: None) -> None:
    for path, (name, body) in itertools.product(server.posts, _bad_objects()):
        answer = server.ask(path, body)
        assert answer.status in (400, 409), (path, name, answer)
        assert answer.error


_json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(["all", "home", "cpu", "cuda:0", MARKUP, "../x"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
_bodies = _json_values | st.dictionaries(
    st.sampled_from(KEYS) | st.text(max_size=5), _json_values, max_size=4
)


def test_whatever_is_sent_is_answered_in_json(server: RoutesServer, gpu: GPU) -> None:
    model = model_of(1)
    residency.take_in([model])

    @examples(
        max_examples=300,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, len(server.posts) - 1), _bodies)
    def ask(index: int, body: Any) -> None:
        path, before = server.posts[index], settings.current()
        answer = server.ask(path, body)
        note(f"{path}: {answer}")
        assert answer.status in (200, 400, 409)
        if answer.status == 200:
            assert isinstance(json.loads(answer.body), dict)
        else:
            assert answer.error
            assert settings.current() == before

    ask()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "a", "{}", ""])
def test_another_content_type_is_refused(server: RoutesServer, unchanged: None, kind: str) -> None:
    for path in server.posts:
        answer = server.ask(path, {"models": "all"}, headers={"Content-Type": kind})
        assert (answer.status, "application/json" in answer.error) == (415, True)


def test_json_of_any_charset_and_without_a_type_is_read(server: RoutesServer) -> None:
    for headers in ({}, {"Content-Type": "application/json; charset=klingon"}):
        assert server.ask("/qmove/settings", {}, headers=headers).status == 200
    assert server.ask("/qmove/settings", raw="{}".encode("utf-16"), headers=JSON).status == 200


def test_a_compressed_body_is_read_and_a_bomb_is_not(server: RoutesServer, unchanged: None) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    assert server.ask("/qmove/settings", raw=gzip.compress(b"{}"), headers=headers).status == 200
    bomb = gzip.compress(b" " * (20 << 20))
    for path in server.posts:
        assert server.ask(path, raw=bomb, headers=headers).status == 413
        assert server.ask(path, raw=b"no gzip", headers=headers).error


def test_a_body_that_is_too_large_is_refused(server: RoutesServer, unchanged: None) -> None:
    most = web_requests.MOST_BYTES
    fits = b"{}".ljust(most)
    assert server.ask("/qmove/settings", raw=fits).status == 200
    for path in server.posts:
        assert server.ask(path, raw=fits + b" ").status == 413
        assert server.ask(path, raw=iter([b"{"] + [b" " * 1000] * 70)).status == 413  # in chunks


def test_a_body_that_says_it_is_huge_is_refused_before_it_comes(server: RoutesServer) -> None:
    for path in server.posts:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {10**13}\r\n\r\n{{".encode())
            assert connection.recv(4096).split()[1] == b"413"


def test_a_body_that_is_cut_off_is_no_error_of_ours(server: RoutesServer, unchanged: None) -> None:
    for path in server.posts:
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(f'{head}Content-Length: 17\r\n\r\n{{"models": '.encode())
    assert server.ask("/qmove/settings", {}).status == 200  # after them


def test_names_come_back_as_text_of_json(server: RoutesServer, unchanged: None) -> None:
    """What shows them must escape them; the browser does not take the answer for a page."""
    answer = server.ask("/qmove/park", {"node": MARKUP, "class": "\x1b[2J"})
    assert answer.status == 400 and MARKUP in answer.error
    assert b"\x1b" not in answer.body
    assert answer.headers["Content-Type"].startswith("application/json")


def test_a_get_changes_nothing(server: RoutesServer, unchanged: None) -> None:
    queries = ["", "?models=all", "?qmove.autoPark=false", "?gib=4&device=../..", "?" + "a" * 4000]
    for path, query in itertools.product(server.gets, queries):
        for body in (None, b'{"models": "all"}', b'{"qmove.autoPark": false}', b"[" * DEEP):
            answer = server.ask(path + query, method="GET", raw=body)
            assert answer.status == 200, (path, query, answer)
    for path in set(server.posts) - set(server.gets):
        assert server.ask(path + "?models=all", method="GET").status in (404, 405)


def test_other_paths_and_methods_are_refused(server: RoutesServer, unchanged: None) -> None:
    for path in ("/qmove/", "/qmove/park/..", "/qmove/../x", "/qmove/%2e%2e/%2e%2e/etc/passwd"):
        assert server.ask(path, {"models": "all"}).status in (403, 404, 405)
    for path, method in itertools.product(server.posts, ["PUT", "DELETE", "PATCH", "TRACE", "X"]):
        assert server.ask(path, method=method, raw=b'{"models": "all"}').status in (400, 405)
