"""Requests that wait for a move take nothing from others: no thread of asyncio's, no end of the
process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from qmove_pack.nodes.host import routes, web_requests
from qmove_pack.nodes.host.stages import job_queue

from tests.nodes.builders.http_routes import RoutesServer
from tests.nodes.conftest import ROOT

pytestmark = pytest.mark.parametrize("host", ["new"], indirect=True)  # the routes are the same


def _threads_of_requests() -> int:
    return sum(thread.name == "qmove request" for thread in threading.enumerate())


def test_waiting_requests_take_a_few_threads_of_their_own(server: RoutesServer) -> None:
    with ThreadPoolExecutor(40) as clients:
        with job_queue.lock:  # as while a model is moved between two nodes
            waiting = [
                clients.submit(server.ask, "/qmove/park", {"models": "all"}) for _ in range(40)
            ]
            while _threads_of_requests() < routes.MOST_ACTING:
                assert server.ask("/qmove/settings", method="GET").status == 200
            # Nobody's executor was used, and reading still answers.
            assert server.loop._default_executor is None  # type: ignore[attr-defined]
            for path in server.gets:
                assert server.ask(path, method="GET").status == 200
            assert not any(request.done() for request in waiting)
            # Those of the GETs may just be ending.
            assert _threads_of_requests() <= routes.MOST_ACTING + routes.MOST_LOOKING < 40
        assert [request.result().status for request in waiting] == [200] * 40


def test_a_request_that_nobody_waits_for_keeps_its_place_until_it_has_ended(host: object) -> None:
    go_on, began = threading.Event(), threading.Event()

    def act() -> str:
        began.set()
        go_on.wait()
        return "first"

    async def story() -> tuple[str, bool]:
        workers = web_requests.Workers(1)
        first = asyncio.create_task(workers.run(act))
        while not began.is_set():
            await asyncio.sleep(0)
        first.cancel()
        second = asyncio.create_task(workers.run(lambda: "second"))
        for _ in range(10):
            await asyncio.sleep(0)
        waited = not second.done()
        go_on.set()
        return await second, waited

    assert asyncio.run(story()) == ("second", True)


def test_without_a_thread_to_start_a_request_is_refused_and_the_next_one_is_tried(
    host: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def story() -> str:
        workers = web_requests.Workers(1)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(web_requests.BadRequest, match="can't start new thread") as refused:
                await workers.run(lambda: "never")
        assert refused.value.status == 503
        return await workers.run(lambda: "next")

    assert asyncio.run(story()) == "next"


def test_the_end_of_the_process_waits_for_no_request(host: object) -> None:
    script = """
        import asyncio, threading
        from tests.nodes.conftest import load_pack
        from qmove_pack.nodes.host import web_requests

        async def story():
            began = threading.Event()
            asyncio.ensure_future(
                web_requests.Workers(1).run(lambda: (began.set(), threading.Event().wait()))
            )
            while not began.is_set():
                await asyncio.sleep(0)

        asyncio.run(story())
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,  # it waits for ever otherwise
    )
    assert (ended.returncode, ended.stderr) == (0, "")
