"""Where RAM has room for one of two models only, auto-parking swaps them."""

from __future__ import annotations

from typing import Any

import pytest
from qmove_pack.nodes.host import browser, settings

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.snapshots import snapshot
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_in, node, noted
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated

LOADS = {f"load{i}": node("Load", mib=mib, shape="plain") for i, mib in ((1, 100), (2, 101))}


@pytest.fixture
def swaps(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """What is swapped: (leaving, coming). The device has room for one of the two models."""
    careless_nodes.forget_all()
    simcuda.set_memory(150 * MIB)
    host.add(*careless_nodes.ALL)
    done: list[tuple[Any, Any]] = []
    swap = qmove.swap

    def recorded(leaving: Any, coming: Any, **options: Any) -> Any:
        done.append((leaving, coming))
        return swap(leaving, coming, **options)

    monkeypatch.setattr(qmove, "swap", recorded)
    return done


def use_both_in_turn(host: FakeHost, turns: int = 2) -> None:
    """Each turn runs one model and then the other, after both are loaded."""
    host.run(LOADS)
    first, second = model_in(host, "load1"), model_in(host, "load2")
    before = snapshot(first), snapshot(second)
    for seed in range(turns):
        for load in LOADS:
            host.run(LOADS | {"use": node("Use", model=(load, 0), seed=seed)})
        assert [device for device, _allocated in noted(f"use {seed}")] == ["cuda:0"] * 2
    assert host.errors == []
    assert (snapshot(first), snapshot(second)) == before


def test_without_mirrors_the_one_that_leaves_and_the_one_that_comes_are_swapped(
    host: FakeHost, gpu: GPU, swaps: list[tuple[Any, Any]]
) -> None:
    settings.change({settings.KEEP_MIRRORS: False})

    use_both_in_turn(host)

    first, second = model_in(host, "load1"), model_in(host, "load2")
    assert [(a is first, b is second) for a, b in swaps] == [(False, False), (True, True)] * 2


def test_two_models_run_in_turn_where_ram_has_room_for_one_of_them(
    host: FakeHost, gpu: GPU, swaps: list[tuple[Any, Any]]
) -> None:
    settings.change({settings.RAM_LIMIT: 180 / 1024})

    use_both_in_turn(host)

    assert len(swaps) == 4


def test_where_ram_has_room_for_both_nothing_is_swapped(
    host: FakeHost, gpu: GPU, swaps: list[tuple[Any, Any]]
) -> None:
    use_both_in_turn(host)

    assert swaps == []


def test_nothing_is_swapped_where_two_models_must_leave(
    host: FakeHost, gpu: GPU, swaps: list[tuple[Any, Any]]
) -> None:
    settings.change({settings.KEEP_MIRRORS: False})
    small = {f"small{i}": node("Load", mib=50 + i, shape="plain") for i in (1, 2)}
    host.run({"load1": LOADS["load1"]})
    host.run({"load1": LOADS["load1"], **small})
    qmove.restore(model_in(host, "small1"))

    host.run({**small, "load1": LOADS["load1"], "use": node("Use", model=("load1", 0), seed=1)})

    assert noted("use 1")[0][0] == "cuda:0"
    assert swaps == []


def test_comfyui_lists_the_model_that_came_and_both_moves_show_in_the_browser(
    host: FakeHost, gpu: GPU, swaps: list[tuple[Any, Any]]
) -> None:
    settings.change({settings.KEEP_MIRRORS: False})
    host.run(LOADS)
    host.server.sent.clear()

    host.run(LOADS | {"use": node("Use", model=("load1", 0), seed=1)})

    assert len(swaps) == 1
    listed = [line.model.model for line in host.management.current_loaded_models]
    assert listed == [model_in(host, "load1")]
    moves = [data for event, data in host.server.sent if event == browser.MOVE]
    assert {m["verb"] for m in moves if m["state"] == "done"} == {"park", "restore"}


def test_a_swap_that_the_user_interrupts_leaves_both_where_they_were(
    host: FakeHost, gpu: GPU, swaps: list[tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.change({settings.KEEP_MIRRORS: False})
    host.run(LOADS)
    first, second = model_in(host, "load1"), model_in(host, "load2")
    send = host.server.send_sync

    def send_sync(event: str, data: Any, sid: str | None = None) -> None:
        send(event, data, sid)
        if event == browser.MOVE and data["done"]:
            host.management.interrupt_current_processing(True)

    monkeypatch.setattr(host.server, "send_sync", send_sync)
    host.run(LOADS | {"use": node("Use", model=("load1", 0), seed=1)})

    assert [type(error) for error in host.errors] == [host.management.InterruptProcessingException]
    assert len(swaps) == 1
    assert qmove.is_parked(first)
    assert not qmove.is_parked(second)
    assert [line.model.model for line in host.management.current_loaded_models] == [second]
