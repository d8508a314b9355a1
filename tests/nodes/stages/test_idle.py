"""After so many idle minutes the VRAM is free, by a clock that the test sets; use brings it home."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.stages import idle, job_queue, lending, pinning

import qmove_core as qmove
import simcuda
from qmove_core import for_hosts
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import model_in, model_of, node
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.guarded import Guarded

pytestmark = pytest.mark.simulated

MINUTES = 10


class Clock:
    """Seconds, which pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def minutes_pass(self, minutes: float) -> None:
        self.now += minutes * 60


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(
    host: FakeHost, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[idle.IdleWatch]:
    """The watch of this process, on that clock."""
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL)
    watch = idle.IdleWatch(clock)
    monkeypatch.setattr(idle, "watch", watch)
    for_hosts.on_move(watch.note_use)
    settings.change({settings.IDLE_MINUTES: MINUTES})
    yield watch
    settings.change({settings.IDLE_MINUTES: 0})


@pytest.fixture
def model(watch: idle.IdleWatch) -> Any:
    model = model_of(16)
    residency.take_in([model])
    watch.note_use()
    return model


def prompt(seed: int) -> dict[str, Any]:
    return {
        "load": node("Load", mib=16, shape="plain"),
        "use": node("Use", model=("load", 0), seed=seed),
    }


def test_it_is_off_unless_the_user_wants_it(
    watch: idle.IdleWatch, clock: Clock, model: Any, gpu: GPU
) -> None:
    settings.change({settings.IDLE_MINUTES: settings.DEFAULTS[settings.IDLE_MINUTES]})
    clock.minutes_pass(10**6)

    watch.look()

    assert not qmove.is_parked(model)


def test_after_so_many_minutes_and_not_before(
    gpu: GPU, watch: idle.IdleWatch, clock: Clock, model: Any
) -> None:
    clock.minutes_pass(MINUTES - 0.5)
    assert watch.look() == 30
    assert not qmove.is_parked(model)

    clock.minutes_pass(0.5)
    watch.look()

    assert qmove.is_parked(model)
    assert gpu.allocated() == 0


def test_each_use_begins_the_minutes_anew(
    watch: idle.IdleWatch, clock: Clock, host: FakeHost
) -> None:
    host.run(prompt(1))
    for seed in range(2, 6):
        clock.minutes_pass(MINUTES - 1)
        host.run(prompt(seed))
        watch.look()
        assert not qmove.is_parked(model_in(host, "load"))
    clock.minutes_pass(MINUTES)
    watch.look()
    assert qmove.is_parked(model_in(host, "load"))


def test_a_node_that_runs_for_hours_is_no_idle_time(
    watch: idle.IdleWatch, clock: Clock, model: Any
) -> None:
    job_queue.node_begins()
    for _ in range(20):
        clock.minutes_pass(MINUTES)
        assert watch.look() == MINUTES * 60
    assert not qmove.is_parked(model)
    job_queue.node_ended()
    watch.note_use()

    clock.minutes_pass(MINUTES - 1)
    watch.look()
    assert not qmove.is_parked(model)


def test_use_wakes_it_and_the_minutes_begin_anew(
    watch: idle.IdleWatch, clock: Clock, host: FakeHost
) -> None:
    host.run(prompt(1))
    model = model_in(host, "load")
    clock.minutes_pass(MINUTES)
    watch.look()
    assert qmove.is_parked(model)

    clock.minutes_pass(100 * MINUTES)
    host.run(prompt(2))
    assert careless_nodes.noted("use 2")[0][0] == "cuda:0"
    watch.look()
    assert not qmove.is_parked(model)

    clock.minutes_pass(MINUTES)
    watch.look()
    assert qmove.is_parked(model)


def test_a_parked_model_that_a_script_uses_is_in_use(
    watch: idle.IdleWatch, clock: Clock, model: Any
) -> None:
    clock.minutes_pass(MINUTES)
    watch.look()
    qmove.restore(model)

    clock.minutes_pass(MINUTES - 1)
    watch.look()
    assert not qmove.is_parked(model)
    clock.minutes_pass(1)
    watch.look()
    assert qmove.is_parked(model)


def test_it_releases_once_until_the_next_use(
    watch: idle.IdleWatch, clock: Clock, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases: list[int] = []
    release = lending.release
    monkeypatch.setattr(
        lending, "release", lambda **options: releases.append(1) or release(**options)
    )
    for _ in range(5):
        clock.minutes_pass(MINUTES)
        watch.look()
    assert releases == [1]


def test_memory_that_the_cpu_shares_is_not_parked(
    watch: idle.IdleWatch, clock: Clock, model: Any
) -> None:
    simcuda.set_integrated(0)
    try:
        clock.minutes_pass(MINUTES)
        watch.look()
    finally:
        simcuda.set_integrated(0, False)

    assert not qmove.is_parked(model)
    lending.release()  # somebody has asked for it
    assert qmove.is_parked(model)


def test_what_is_pinned_stays(watch: idle.IdleWatch, clock: Clock, model: Any) -> None:
    pinning.pin_models([adopted_of(model)], "pin")
    clock.minutes_pass(MINUTES)

    watch.look()

    assert not qmove.is_parked(model)
    qmove.unpin(model)


def test_a_node_that_ran_while_it_waited_for_its_turn_is_a_use(
    watch: idle.IdleWatch, clock: Clock, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = job_queue.run_if_free

    def run_later(job: Any) -> bool:
        watch.note_use()
        return run(job)

    monkeypatch.setattr(job_queue, "run_if_free", run_later)
    clock.minutes_pass(MINUTES)
    watch.look()

    assert not qmove.is_parked(model)


def test_a_failure_is_logged_and_the_watch_goes_on(
    watch: idle.IdleWatch,
    clock: Clock,
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    guarded: Guarded,
) -> None:
    guarded.expect("free VRAM after idle minutes")
    with monkeypatch.context() as patched:
        patched.setattr(lending, "release", lambda **options: 1 / 0)
        clock.minutes_pass(MINUTES)
        watch.look()
    watch.note_use()
    clock.minutes_pass(MINUTES)
    watch.look()
    assert qmove.is_parked(model)


def test_the_thread_looks_when_it_may_be_time_and_ends_with_the_setting(
    watch: idle.IdleWatch, clock: Clock, model: Any
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        clock.now += seconds
        if len(waits) == 1:  # a use, a minute before it would have been time
            clock.now -= 60
            watch.note_use()
        if qmove.is_parked(model):
            settings.change({settings.IDLE_MINUTES: 0})

    watch.run(wait)

    assert waits == [MINUTES * 60] * 3
    assert qmove.is_parked(model)


def test_the_setting_starts_one_thread_and_ends_it(watch: idle.IdleWatch) -> None:
    watch.follow_setting()
    first = watch._thread
    watch.follow_setting()
    assert first is not None and watch._thread is first and first.daemon

    settings.change({settings.IDLE_MINUTES: 0})
    watch.follow_setting()
    first.join(60)
    assert not first.is_alive()

    settings.change({settings.IDLE_MINUTES: MINUTES})
    watch.follow_setting()
    second = watch._thread
    assert second is not None and second is not first
    settings.change({settings.IDLE_MINUTES: 0})
    watch.follow_setting()
    second.join(60)
    assert not second.is_alive()
