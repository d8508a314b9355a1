"""Out of memory in a real ComfyUI: where idle models can go, the node runs once more by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.builders.comfyui_process import ComfyUI
from tests.nodes.builders.real_prompts import (
    CARELESS,
    assert_passed,
    load,
    messages,
    needs_comfyui,
    node,
    show,
    shown,
    start,
    use,
)

pytestmark = needs_comfyui

MEMORY = "4000MiB"
IDLE_MIB = 2600


def work(mib: Any, seed: int, name: str = "CarelessScratch", **inputs: Any) -> dict[str, Any]:
    return node(name, mib=mib, device="cuda:0", seed=seed, **inputs)


def beside_an_idle_model(idle_mib: int, work_mib: int, seed: int) -> dict[str, Any]:
    """A model that was used and waits, and a node that then takes VRAM for a moment."""
    return {
        "load": load(idle_mib),
        "use": use("load"),
        "work": work(work_mib, seed, after=("use", 0)),
        "show": show("work"),
    }


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    with start(tmp_path_factory.mktemp("qmove"), MEMORY) as comfyui:
        yield comfyui


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A ComfyUI without qmove."""
    with start(tmp_path_factory.mktemp("alone"), MEMORY, packs=(CARELESS,)) as comfyui:
        yield comfyui


def test_work_of_64_then_1600_mib_beside_an_idle_model_and_the_same_again(
    comfyui: ComfyUI, alone: ComfyUI
) -> None:
    for seed, mib in enumerate((64, 1600, 64, 1600)):
        assert_passed(comfyui, comfyui.run(beside_an_idle_model(IDLE_MIB, mib, seed)))
        without = alone.run(beside_an_idle_model(IDLE_MIB, mib, seed))
        failed = [error["node_id"] for error in messages(without, "execution_error")]
        assert failed == (["work"] if mib == 1600 else [])


def test_work_of_1600_mib_beside_an_idle_1500_mib_model_on_4000_mib(tmp_path: Path) -> None:
    with start(tmp_path, MEMORY) as comfyui:
        for seed, mib in enumerate((64, 1600, 64, 1600)):
            assert_passed(comfyui, comfyui.run(beside_an_idle_model(1500, mib, seed)))


def test_a_node_that_can_never_fit_runs_twice_at_most_and_fails_with_its_own_error(
    comfyui: ComfyUI,
) -> None:
    for seed in (100, 101):
        history = comfyui.run(beside_an_idle_model(IDLE_MIB, 4500, seed))

        (error,) = messages(history, "execution_error")
        assert error["node_id"] == "work"
        assert "OutOfMemoryError" in error["exception_type"]
        assert 1 <= comfyui.times_noted(f"scratch 4500 {seed}") <= 2
    assert_passed(comfyui, comfyui.run(beside_an_idle_model(IDLE_MIB, 64, 102)))


def test_a_node_that_does_things_outside_does_not_run_twice(comfyui: ComfyUI) -> None:
    """Whether it passes or runs out of memory at first; then it is known what it takes."""
    prompt = {"load": load(IDLE_MIB), "use": use("load", seed=7)}
    for seed in (200, 201, 202):
        save = work(1700, seed, name="CarelessSave", after=("use", 0))
        history = comfyui.run(prompt | {"save": save})
        if seed > 200:
            assert_passed(comfyui, history)
        assert comfyui.times_noted(f"scratch 1700 {seed}") == 1


def test_a_node_that_has_run_for_one_element_of_a_list_does_not_run_again(comfyui: ComfyUI) -> None:
    for seed in (400, 401):
        prompt = {
            "load": load(IDLE_MIB),
            "use": use("load", seed=8),
            "sizes": node("CarelessSizes", sizes="32 1650", after=("use", 0)),
            "work": work(("sizes", 0), seed),
            "show": show("work"),
        }
        history = comfyui.run(prompt)
        if seed > 400:  # known by then
            assert_passed(comfyui, history)
        assert comfyui.times_noted(f"scratch 32 {seed}") == 1
        assert comfyui.times_noted(f"scratch 1650 {seed}") == 1


def test_not_enough_memory_is_out_of_memory_to_comfyui_and_to_packs(tmp_path: Path) -> None:
    """A parked model is used where it has no room: the node that falls back to less does so."""
    with start(tmp_path, MEMORY) as comfyui:
        prompt = {
            "load": load(IDLE_MIB),
            "tiles": node("CarelessTiles", model=("load", 0), mib=1700),
            "show": show("tiles"),
        }
        history = comfyui.run(prompt)

        assert_passed(comfyui, history)
        assert shown(history)["show"] == ["tiled", "NotEnoughDeviceMemory", "True"]


def test_switched_off_a_node_that_runs_out_of_memory_does_not_run_again(tmp_path: Path) -> None:
    with start(tmp_path, MEMORY, settings={"qmove.autoPark": False}) as comfyui:
        history = comfyui.run(beside_an_idle_model(IDLE_MIB, 1600, 300))

        (error,) = messages(history, "execution_error")
        assert error["node_id"] == "work"
        assert comfyui.times_noted("scratch 1600 300") == 1


def two_workflows(turn: int, second: bool) -> dict[str, Any]:
    """Each loads a model of 400 MiB and computes in 64 MiB."""
    return {
        "load": load(400, seed=int(second)),
        "use": use("load", seed=turn, scratch_mib=64),
        "show": show("use"),
    }


def test_two_workflows_in_turn_on_640_mib(tmp_path: Path) -> None:
    with start(tmp_path, "640MiB") as comfyui:
        for turn in range(6):
            assert_passed(comfyui, comfyui.run(two_workflows(turn, bool(turn % 2))))
