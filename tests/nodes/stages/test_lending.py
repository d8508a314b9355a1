"""Another program shares the card: all VRAM goes back to the system, and what the last prompt used
comes home again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import browser, progress
from qmove_pack.nodes.host.models import finding, residency
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.stages import job_queue, last_run, lending, pinning

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.snapshots import snapshot
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_in, model_of, node
from tests.nodes.builders.dynamic_vram import DynamicCard
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

pytestmark = pytest.mark.simulated


class Patched(careless_nodes._Node):
    """Uses one of ComfyUI's own models."""

    given: ModelPatcher

    def run(self) -> tuple[Any]:
        return (self.given,)


class UsePatched(careless_nodes._Node):
    INPUTS = {"model": ("MODEL", {}), "seed": ("INT", {})}  # noqa: RUF012

    def run(self, model: Any, seed: int = 0) -> tuple[Any]:
        return (seed,)


@pytest.fixture(autouse=True)
def fresh(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    careless_nodes.forget_all()
    finding.forget_all()
    monkeypatch.setattr(last_run, "_graph", None)
    last_run._adopted.clear()
    last_run._patchers.clear()
    host.add(*careless_nodes.ALL, Patched, UsePatched)


def use(mib: int = 16, seed: int = 1, shape: str = "plain") -> dict[str, Any]:
    return {
        "load": node("Load", mib=mib, shape=shape),
        "use": node("Use", model=("load", 0), seed=seed),
    }


@pytest.fixture
def emptied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that were allocated when the allocator's cache was emptied, in turn."""
    found: list[int] = []
    empty = torch.cuda.empty_cache

    def empty_cache() -> None:
        found.append(torch.cuda.memory_allocated(0))
        empty()

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    return found


@pytest.fixture
def caching() -> Iterator[None]:
    """PyTorch's caching allocator, which keeps what is freed."""
    before = simcuda.set_allocator("native")
    yield
    simcuda.set_allocator(before)


def in_background(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keeps the jobs that would run in a thread, to be run by the test."""
    jobs: list[Any] = []
    monkeypatch.setattr(job_queue, "run_in_background", jobs.append)
    return jobs


def test_release_leaves_no_byte_and_no_cached_block(
    host: FakeHost, gpu: GPU, emptied: list[int], caching: None
) -> None:
    host.run(use())
    model = model_in(host, "load")
    before = snapshot(model)
    cached = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda:0")
    del cached
    assert torch.cuda.memory_reserved(0) > gpu.allocated() > 0
    driver = torch.cuda.mem_get_info(0)[0]
    reserved = torch.cuda.memory_reserved(0)

    released = lending.release()

    assert emptied[-1] == gpu.allocated() == torch.cuda.memory_reserved(0) == 0
    first = released["devices"][0]
    assert (first["name"], first["held"], first["stayed"]) == ("cuda:0", 0, [])
    assert first["free"] == torch.cuda.mem_get_info(0)[0] == driver + reserved
    assert first["freed"] == reserved
    assert first["total"] == simcuda.parse_size("4GiB")
    assert "error" not in released
    assert qmove.is_parked(model)
    qmove.restore(model)
    assert snapshot(model) == before


def test_release_with_nothing_there_says_so_and_frees_what_is_cached(
    host: FakeHost, emptied: list[int]
) -> None:
    torch.zeros(1, device="cuda:0")

    released = lending.release()

    assert emptied
    assert released["report"].startswith("cuda:0: 4.00 GiB free, ")
    assert [device["stayed"] for device in released["devices"]] == [[], []]


def test_comfyuis_own_models_are_unloaded_by_comfyui(host: FakeHost, gpu: GPU) -> None:
    patcher = ModelPatcher(model_of(16, "cpu"))
    host.management.load_models_gpu([patcher])
    assert gpu.allocated()

    released = lending.release()

    assert gpu.allocated() == 0
    assert not qmove.is_parked(patcher.model)
    assert adopted_of(patcher.model) is None
    assert host.management.current_loaded_models == []
    assert released["devices"][0]["stayed"] == []


def test_dynamic_models_give_their_pages_up(host: FakeHost) -> None:
    card = DynamicCard(host, 256)
    patcher = card.load(100)
    assert patcher.pages == 100 * MIB

    released = lending.release()

    assert patcher.pages == 0
    assert released["devices"][0]["free"] == 256 * MIB


def test_what_is_pinned_stays_and_is_named(host: FakeHost, gpu: GPU) -> None:
    pinned, other = model_of(16), model_of(8)
    residency.take_in([pinned, other])
    pinning.pin_models([adopted_of(pinned)], "pin")
    nbytes = sum(parameter.nbytes for parameter in pinned.parameters())

    released = lending.release()

    assert gpu.allocated() == nbytes
    (stayed,) = released["devices"][0]["stayed"]
    assert stayed == {
        "name": "Sequential",
        "nbytes": nbytes,
        "pinned": True,
        "reason": "it is pinned",
    }
    assert "error" not in released  # the user wants it so
    assert "stayed" in released["report"]
    qmove.unpin(pinned)


def test_one_that_cannot_leave_stops_no_other(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    big, small = model_of(64), model_of(8)
    residency.take_in([big, small])
    qmove.configure(ram_limit=16 * MIB)

    released = lending.release()

    assert (qmove.is_parked(big), qmove.is_parked(small)) == (False, True)
    (stayed,) = released["devices"][0]["stayed"]
    assert (stayed["nbytes"], stayed["pinned"]) == (gpu.allocated(), False)
    assert "ram_limit" in stayed["reason"]
    assert released["error"].startswith("Sequential stays on cuda:0: ")


def test_a_cancelled_release_keeps_what_had_left(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [model_of(16), model_of(8)]
    residency.take_in(models)
    send, cancelled = host.server.send_sync, []

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        second = event == browser.MOVE and data["model"] == adopted_of(models[1]).number
        if second and data["state"] == "running" and not cancelled:
            cancelled.append(progress.cancel(data["id"]))

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    with pytest.raises(progress.Cancelled):
        job_queue.run_or_queue(lending.release)

    assert cancelled == ["move"]
    assert [qmove.is_parked(model) for model in models] == [True, False]


def test_take_back_answers_at_once_with_what_it_begins(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(use())
    model = model_in(host, "load")
    before, nbytes = snapshot(model), gpu.allocated()
    lending.release()
    jobs = in_background(monkeypatch)

    answer = lending.take_back()

    assert answer["began"] == [{"name": "Sequential", "device": "cuda:0", "nbytes": nbytes}]
    assert answer["stays"] == []
    assert gpu.allocated() == 0  # it only answered
    assert [job() for job in jobs] == [
        f"Sequential is home again: {nbytes / MIB:.2f} MiB on cuda:0."
    ]
    assert gpu.allocated() == nbytes
    assert snapshot(model) == before


def test_take_back_runs_by_itself_and_tells_the_browsers(host: FakeHost, gpu: GPU) -> None:
    import threading

    told = threading.Event()
    host.run(use())
    model = model_in(host, "load")
    lending.release()
    send = host.server.send_sync

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.RESULT:
            told.set()

    host.server.send_sync = send_sync  # type: ignore[method-assign]
    lending.take_back()

    assert told.wait(60)
    assert not qmove.is_parked(model)
    moves = [data for event, data in host.server.sent if event == browser.MOVE]
    assert (moves[-1]["verb"], moves[-1]["state"]) == ("restore", "done")
    assert {move["cancel"] for move in moves if move["state"] == "running"} >= {"move"}


def test_take_back_brings_the_last_prompts_models_and_no_others(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model_of(8)
    residency.take_in([before])
    host.run(use(mib=24))
    first = model_in(host, "load")
    host.run(use(mib=16, seed=2))
    second = model_in(host, "load")
    lending.release()
    jobs = in_background(monkeypatch)

    lending.take_back()
    jobs[0]()

    assert [qmove.is_parked(model) for model in (before, first, second)] == [True, True, False]


def test_take_back_loads_comfyuis_own_through_comfyui(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher = ModelPatcher(model_of(16, "cpu"))
    monkeypatch.setattr(Patched, "given", patcher, raising=False)
    residency.take_in([_ours := model_of(8)])
    host.management.load_models_gpu([patcher])
    host.run({"give": node("Patched"), "use": node("UsePatched", model=("give", 0), seed=1)})
    lending.release()
    host.management.requests.clear()
    jobs = in_background(monkeypatch)

    assert [part["name"] for part in lending.take_back()["began"]] == ["Sequential"]
    jobs[0]()

    assert host.management.requests == [["Sequential"]]
    assert patcher.loaded_size() == gpu.allocated() > 0


def test_take_back_parks_nothing_to_bring_something_home(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(use(mib=64))
    away = model_in(host, "load")
    lending.release()
    residency.take_in([here := model_of(40)])
    there = gpu.allocated()
    simcuda.set_memory(80 * MIB)
    jobs = in_background(monkeypatch)

    answer = lending.take_back()
    report = jobs[0]()

    assert (answer["began"], [part["name"] for part in answer["stays"]]) == ([], ["Sequential"])
    assert "It comes home when it is used." in report
    assert (qmove.is_parked(away), qmove.is_parked(here)) == (True, False)
    assert gpu.allocated() == there


def test_take_back_of_nothing_begins_nothing(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(use())
    jobs = in_background(monkeypatch)

    assert lending.take_back() == {
        "report": "Nothing that the last prompt used is away.",
        "began": [],
        "stays": [],
    }
    assert jobs == []


def test_a_model_that_is_gone_is_not_taken_back(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run(use())
    lending.release()
    host.cache.entries.clear()
    careless_nodes.forget_all()
    jobs = in_background(monkeypatch)

    assert lending.take_back()["began"] == []
    assert jobs == []


def test_after_a_release_the_next_prompt_brings_its_models_home_by_itself(host: FakeHost) -> None:
    host.run(use())
    lending.release()

    host.run(use(seed=2))

    assert host.errors == []
    assert [device for device, _ in careless_nodes.noted("use 2")] == ["cuda:0"]
