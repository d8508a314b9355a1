"""While a model is on lease nobody parks it; who waits is served first come, first served."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import qmove_core as qmove
from qmove_core.pool import ModelPool, State
from tests.builders.device import GPU
from tests.builders.pooled_models import SIZE, Loaders, is_right

Make = Callable[..., ModelPool]
DEADLINE = 60.0  # seconds; only what hangs comes near


@pytest.fixture
def threads() -> Any:
    with ThreadPoolExecutor(16) as executor:
        yield executor


def waits(pool: ModelPool, count: int) -> None:
    """Goes on when so many requests wait."""
    passed = threading.Event()
    for _ in range(10_000):
        if len(pool.figures()["waiting"]) == count:
            return
        passed.wait(0.002)
    raise AssertionError(f"{pool.figures()['waiting']} wait")


MOVES: dict[str, Callable[[Any], Any]] = {
    "park": qmove.park,
    "park to disk": lambda model: qmove.park(model, to="disk"),
    "park in part": lambda model: qmove.park(model, free=1),
    "move": lambda model: qmove.move(model, "cpu"),
    "move to another GPU": lambda model: qmove.move(model, "cuda:1"),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("in_thread", [False, True], ids=["own thread", "another thread"])
def test_nobody_moves_what_is_on_lease(
    make: Make, threads: ThreadPoolExecutor, tmp_path: Any, name: str, in_thread: bool
) -> None:
    qmove.configure(disk_folder=tmp_path)
    pool = make("ab", vram=1)
    with pool.use("a") as model:
        with pytest.raises(qmove.Pinned, match=r"a lease of 'a' of ModelPool \d+ keeps"):
            if in_thread:
                threads.submit(MOVES[name], model).result(DEADLINE)
            else:
                MOVES[name](model)
        assert pool.state("a") is State.ON_LEASE and is_right(model, "a")
    MOVES[name](model)


def test_a_swap_leaves_it_where_it_is(make: Make, loaders: Loaders) -> None:
    pool, other = make("a", vram=1), loaders("x")()
    qmove.park(other)
    with pool.use("a") as model, pytest.raises(qmove.Pinned):
        qmove.swap(model, other)
    qmove.swap(model, other)
    assert pool.state("a") is State.IN_RAM


def test_unpin_does_not_end_a_lease_and_a_pin_outlives_it(make: Make) -> None:
    pool = make("ab", vram=2)
    with pool.use("a") as model:
        assert qmove.is_pinned(model) and not qmove.unpin(model)
        with pytest.raises(qmove.Pinned):
            qmove.park(model)
        qmove.pin(model)
    with pytest.raises(qmove.Pinned, match="a pin"):
        qmove.park(model)
    assert qmove.unpin(model)


def test_a_users_pin_keeps_a_model_of_the_pool_home(make: Make) -> None:
    pool = make("ab", vram=1)
    with pool.use("a") as model:
        pass
    qmove.pin(model)
    with pytest.raises(qmove.NotEnoughMemory, match="unpin"):
        pool.use("b").acquire()
    qmove.unpin(model)
    with pool.use("b"):
        assert pool.state("a") is State.IN_RAM


def test_a_part_of_another_object_stays_too(make: Make) -> None:
    pool = make("a", vram=1)
    with pool.use("a") as model:
        whole = {"first": model, "other": torch.nn.Linear(4, 4).to("cuda:0")}
        parked = qmove.park(whole)
        assert parked.stragglers and is_right(model, "a")
        assert next(model.parameters()).device.type == "cuda"


def test_leases_of_one_model_are_shared_and_the_last_one_ends_it(make: Make) -> None:
    pool = make("ab", vram=1)
    first, second = pool.use("a"), pool.use("a")
    assert first.acquire() is second.acquire()
    first.release()
    first.release()  # a second time does nothing
    with pytest.raises(qmove.NotEnoughMemory):
        pool.use("b", timeout=0).acquire()
    second.release()
    with pool.use("b", timeout=0):
        pass


def test_no_room_refuses_at_once_with_its_figures_and_who_has_them(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    pool = make("ab", vram=1)
    holder = pool.use("a")
    holder.acquire()
    # One of the thread that holds a would never be granted; this one may be, later.
    with pytest.raises(qmove.NotEnoughMemory) as raised:
        threads.submit(pool.use("b", timeout=0.0).acquire).result(DEADLINE)
    error = raised.value
    assert (error.place, error.needed, error.free) == ("cuda:0", SIZE, 0)
    assert "on lease: a 512.00 KiB" in str(error)


def test_a_lease_that_is_forgotten_is_given_back(make: Make) -> None:
    pool = make("ab", vram=1)
    lease = pool.use("a")
    lease.acquire()
    del lease
    gc.collect()
    with pool.use("b", timeout=0):
        pass


def test_after_its_end_a_lease_has_no_model(make: Make) -> None:
    pool = make("a")
    lease = pool.use("a")
    with pytest.raises(RuntimeError, match="was not entered"):
        _ = lease.model
    with lease:
        assert lease.came_from is State.NOT_LOADED
    with pytest.raises(RuntimeError, match="has ended"):
        _ = lease.model
    with pytest.raises(RuntimeError, match="for one use"):
        lease.acquire()


def test_first_come_first_served_also_where_a_later_one_would_fit(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    pool, order = make("abc", vram=1), list[str]()
    holder = pool.use("a")
    holder.acquire()

    def use(name: str, label: str) -> None:
        with pool.use(name) as model:
            order.append(label)
            assert is_right(model, name)

    asked = []
    for count, name in enumerate("bacab"):
        asked.append(threads.submit(use, name, f"{name}{count}"))
        waits(pool, count + 1)  # a, which is home, does not overtake b
    holder.release()
    for one in asked:
        one.result(DEADLINE)
    assert order == ["b0", "a1", "c2", "a3", "b4"]


def test_a_model_in_steady_use_keeps_nobody_out(make: Make, threads: ThreadPoolExecutor) -> None:
    """Leases of a overlap for as long as b waits; each is asked for before the last one ends."""
    pool = make("ab", vram=1)
    got_b = threading.Event()

    def use_b() -> None:
        with pool.use("b"):
            got_b.set()

    current = pool.use("a")
    current.acquire()
    waiting = threads.submit(use_b)
    waits(pool, 1)
    following = threads.submit(pool.use("a").acquire)
    waits(pool, 2)
    current.release()
    assert is_right(following.result(DEADLINE), "a")
    assert got_b.is_set()
    waiting.result(DEADLINE)


def test_who_holds_a_lease_goes_ahead_of_those_who_wait_for_it(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    pool = make("abcd", vram=2)
    with pool.use("a"), pool.use("b"):
        pass

    def use_c_and_d() -> None:
        with pool.use("c"), pool.use("d"):
            pass

    with pool.use("a"):
        holder = pool.use("b")
        holder.acquire()
        both = threads.submit(use_c_and_d)
        waits(pool, 1)
        with pool.use("b", timeout=0):  # it would wait behind those who wait for this thread
            pass
        holder.release()
    both.result(DEADLINE)


def test_those_who_would_wait_for_each_other_for_good_are_refused(
    make: Make, threads: ThreadPoolExecutor
) -> None:
    pool = make("abc", vram=2)
    held = threading.Barrier(2, timeout=DEADLINE)

    def use_then(first: str, second: str) -> str:
        with pool.use(first):
            held.wait()
            try:
                with pool.use(second) as model:
                    return "right" if is_right(model, second) else "wrong"
            except qmove.NotEnoughMemory:
                return "refused"

    results = [threads.submit(use_then, "a", "c"), threads.submit(use_then, "b", "c")]
    assert sorted(one.result(DEADLINE) for one in results) == ["refused", "right"]


def test_who_has_given_back_while_the_pool_was_locked_is_not_refused(make: Make) -> None:
    pool = make("ab", vram=1)
    lease = pool.use("a")
    lease.acquire()
    section = pool._section
    section._lock.acquire()  # another thread is in the middle of a step
    lease.release()
    section._lock.release()  # and this one has the lock before that thread looks
    with pool.use("b", timeout=0) as model:
        assert is_right(model, "b")


def test_a_thread_that_waits_for_itself_is_refused_at_once(make: Make) -> None:
    pool = make("ab", vram=1)
    with pool.use("a"), pytest.raises(qmove.NotEnoughMemory, match="give a lease back"):
        pool.use("b").acquire()
    with pool.use("b"):
        pass


def test_many_threads_get_each_model_right_within_the_budget(
    make: Make, loaders: Loaders, threads: ThreadPoolExecutor, gpu: GPU
) -> None:
    pool = make("abcdef", vram=2)
    gpu.reset_peak()

    def use(seed: int) -> bool:
        names = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        for index in names:
            with pool.use("abcdef"[index], timeout=DEADLINE) as model:
                if not is_right(model, "abcdef"[index]):
                    return False
        return True

    assert all(threads.map(use, range(8)))
    assert loaders.loads == dict.fromkeys("abcdef", 1)
    assert gpu.peak() <= 2 * SIZE + (2 << 20)


def test_one_load_serves_all_who_ask_meanwhile(
    make: Make, loaders: Loaders, threads: ThreadPoolExecutor
) -> None:
    pool, loading, go_on = make("a"), threading.Event(), threading.Event()

    def wait(name: str) -> None:
        loading.set()
        assert go_on.wait(DEADLINE)

    loaders.fail = wait
    asked = [threads.submit(pool.use("a").acquire) for _ in range(4)]
    assert loading.wait(DEADLINE)
    waits(pool, 3)
    go_on.set()
    assert len({id(one.result(DEADLINE)) for one in asked}) == 1
    assert loaders.loads["a"] == 1


def test_a_resident_model_is_served_while_another_one_loads(
    make: Make, loaders: Loaders, threads: ThreadPoolExecutor
) -> None:
    pool, loading, go_on = make("ab", vram=2), threading.Event(), threading.Event()
    with pool.use("a"):
        pass

    def wait(name: str) -> None:
        loading.set()
        assert go_on.wait(DEADLINE)

    loaders.fail = wait
    asked = threads.submit(pool.use("b").acquire)
    assert loading.wait(DEADLINE)
    with pool.use("a", timeout=0) as model:
        assert is_right(model, "a")
    go_on.set()
    asked.result(DEADLINE)


def test_async_uses_are_served_while_the_loop_goes_on(make: Make, loaders: Loaders) -> None:
    pool = make("abc", vram=1)

    async def use(name: str) -> bool:
        async with pool.use(name) as model:
            await asyncio.sleep(0)
            return is_right(model, name)

    async def all_of_them() -> list[bool]:
        return await asyncio.gather(*[use(name) for name in "abcabcabc"])

    assert all(asyncio.run(all_of_them()))
    assert loaders.loads == dict.fromkeys("abc", 1)


def test_a_cancelled_task_leaves_nothing_behind(make: Make) -> None:
    pool = make("ab", vram=1)

    async def wait_in_vain() -> None:
        async with pool.use("a"):
            asked = asyncio.ensure_future(pool.use("b").acquire_async())
            while not pool.figures()["waiting"]:
                await asyncio.sleep(0.001)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert pool.figures()["waiting"] == []
        async with pool.use("b", timeout=0):
            pass

    asyncio.run(wait_in_vain())


def test_one_cancelled_while_its_model_comes_home_gives_it_back(
    make: Make, loaders: Loaders
) -> None:
    pool, loading, go_on = make("ab", vram=1), threading.Event(), threading.Event()

    def wait(name: str) -> None:
        loading.set()
        assert go_on.wait(DEADLINE)

    async def cancel() -> None:
        loaders.fail = wait
        asked = asyncio.ensure_future(pool.use("a").acquire_async())
        assert await asyncio.to_thread(loading.wait, DEADLINE)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        go_on.set()
        async with pool.use("b", timeout=DEADLINE) as model:
            assert is_right(model, "b")

    asyncio.run(cancel())
    assert pool.figures()["by_name"]["a"]["leases"] == 0
