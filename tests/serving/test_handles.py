"""What a server holds instead of a model: it stays home as long as the handle, and leaves with it."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

import qmove_core as qmove
from qmove_core import homes
from qmove_core.memory import giving_back
from qmove_core.pool import ModelPool, State
from qmove_core.serving import ray_serve
from qmove_core.serving.handles import ModelHandle
from qmove_core.serving.replica import Replica
from tests.builders.device import GPU
from tests.builders.pooled_models import SIZE, Loaders, full_pool, is_right


@pytest.fixture
def pool(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelPool]:
    monkeypatch.setattr(giving_back.watch, "start", lambda: None)
    with full_pool(Loaders(), "abc", vram=1) as pool:
        yield pool


def handle_of(pool: ModelPool, name: str) -> ModelHandle:
    lease = pool.use(name)
    lease.acquire()
    return ModelHandle(pool, name, lease)


def background_done(pool: ModelPool) -> None:
    pool._desk._background.submit(lambda: None).result(60)


def test_as_long_as_it_lives_the_model_stays_home(pool: ModelPool) -> None:
    handle = handle_of(pool, "a")
    with handle.use() as model:
        assert is_right(model, "a")
    assert pool.state("a") is State.ON_LEASE
    with pytest.raises(qmove.Pinned):
        qmove.park(model)
    handle.__del__()


def test_its_end_in_a_thread_and_once_more_when_it_dies_parks_once(pool: ModelPool) -> None:
    """As Ray does: `__del__` in a thread of its executor, and Python's own."""
    handle = handle_of(pool, "a")
    before = qmove.stats().parks
    thread = threading.Thread(target=handle.__del__)
    thread.start()
    thread.join()
    assert pool.state("a") is State.IN_RAM
    other = handle_of(pool, "a")  # the model is used again before the first handle dies
    handle.__del__ = lambda _: None  # type: ignore[method-assign]
    del handle, thread
    gc.collect()
    assert pool.state("a") is State.ON_LEASE
    assert qmove.stats().parks == before + 1
    other.__del__()


def test_a_request_that_runs_keeps_the_model_home_beyond_the_handle(pool: ModelPool) -> None:
    handle = handle_of(pool, "a")
    with handle.use() as model:
        handle.__del__()
        assert pool.state("a") is State.ON_LEASE and is_right(model, "a")
    with pool.use("b"):
        assert pool.state("a") is State.IN_RAM


def test_a_handle_that_was_dropped_still_answers(pool: ModelPool) -> None:
    handle = handle_of(pool, "a")
    handle.__del__()
    with handle.use() as model:
        assert is_right(model, "a")


@pytest.mark.parametrize("where", ["in a loop", "while it moves", "while the pool is locked"])
def test_a_finalizer_waits_for_no_move(pool: ModelPool, where: str) -> None:
    handles = [handle_of(pool, "a")]

    async def drop_in_a_loop() -> None:
        handles.clear()

    if where == "in a loop":
        asyncio.run(drop_in_a_loop())
    elif where == "while it moves":
        with homes.lock:
            handles.clear()
    else:
        with pool._section:
            handles.clear()
    background_done(pool)
    assert pool.state("a") is State.IN_RAM


def test_a_replica_sleeps_though_the_server_holds_models(pool: ModelPool, gpu: GPU) -> None:
    replica = Replica(pool, timeout=60)

    async def run() -> None:
        handle = await replica.handle("a")
        assert await replica.sleep(60) == SIZE
        assert replica.is_sleeping and gpu.allocated() == 0
        await replica.wake_up()
        assert await replica.answer(handle, is_right, "a")

    asyncio.run(run())
    assert not replica.is_sleeping
    assert replica.figures()["loads"] == 1


def test_where_the_pool_decides_a_held_model_may_wait_in_ram(pool: ModelPool) -> None:
    replica = Replica(pool, timeout=60, holds_vram=False)

    async def run() -> None:
        handles = [await replica.handle(name) for name in "abc"]
        for handle in [*handles, *handles]:
            assert await replica.answer(handle, is_right, handle.name)
        assert pool.state("c") is State.HOME
        await asyncio.to_thread(handles[2].__del__)
        assert pool.state("c") is State.IN_RAM

    asyncio.run(run())
    assert replica.figures()["loads"] == 3


def test_the_seconds_to_wake_are_told(pool: ModelPool) -> None:
    woken: dict[str, float] = {}
    replica = Replica(pool, on_wake=woken.__setitem__)

    async def run() -> None:
        for name in "aba":
            handle = await replica.handle(name)
            await asyncio.to_thread(handle.__del__)

    asyncio.run(run())
    assert list(woken) == ["a"] and woken["a"] > 0


NEEDS_RAY: dict[str, Callable[[], object]] = {
    "serve": ray_serve.serve,
    "application": lambda: ray_serve.application({}, print),
    "Metrics": ray_serve.Metrics,
}


@pytest.mark.parametrize("name", NEEDS_RAY)
def test_without_ray_it_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(qmove.MissingDependency, match=r"pip install 'qmove\[ray\]'"):
        NEEDS_RAY[name]()


def test_importing_it_imports_no_ray() -> None:
    program = "import sys; sys.modules['ray'] = None; from qmove_core.serving import ray_serve"
    subprocess.run([sys.executable, "-c", program], check=True)
