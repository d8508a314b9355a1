"""Nodes that purge VRAM and empty ComfyUI's list, and loops that make their rounds one by one, in a
real ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.nodes.builders.comfyui_process import ComfyUI
from tests.nodes.builders.real_prompts import (
    assert_passed,
    digests,
    load,
    messages,
    model_bytes,
    needs_comfyui,
    node,
    show,
    start,
    use,
)

pytestmark = needs_comfyui

MIB = 1 << 20
MEMORY, OURS_MIB, OWN_MIB = "2000MiB", 900, 400  # ComfyUI wants 1.2 GiB beside its own model


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    with start(tmp_path_factory.mktemp("qmove"), MEMORY) as comfyui:
        yield comfyui


def test_after_a_node_has_emptied_its_list_comfyui_still_makes_room_for_its_own_model(
    comfyui: ComfyUI,
) -> None:
    for run in range(2):
        prompt = {
            "load": load(OURS_MIB),
            "use": use("load", seed=run),
            "clear": node("CarelessClear", after=("use", 0)),
            "own": node("CarelessOwnLoader", mib=OWN_MIB),
            "sample": node("CarelessSample", model=("own", 0), seed=run, after=("clear", 0)),
            "show": show("sample"),
        }
        assert_passed(comfyui, comfyui.run(prompt))

        state = comfyui.get("/qmove/state")
        assert [model["state"] for model in state["models"]] == ["parked"]
        (own,) = state["comfyui_models"]
        assert own["resident"] == {"cuda:0": model_bytes(OWN_MIB)}  # whole


def test_a_purge_destroys_what_is_resident_and_says_so_and_no_parked_model(
    comfyui: ComfyUI,
) -> None:
    first = {"load1": load(100, seed=1), "use1": use("load1", seed=1), "show1": show("use1")}
    expected = digests(comfyui.run(first))
    assert comfyui.post("/qmove/park", {"models": "all"})[0] == 200
    prompt = {
        "load1": first["load1"],
        "load2": load(100, seed=2),
        "use2": use("load2", seed=2),
        "purge": node("CarelessPurge", after=("use2", 0)),
        "again": use("load2", seed=3, after=("purge", 0)),
        "show2": show("again"),
    }

    (error,) = messages(comfyui.run(prompt), "execution_error")

    assert error["node_id"] == "again"
    assert "8 of the tensors of Stack have no bytes any more" in error["exception_message"]
    history = comfyui.run(first | {"use1": use("load1", seed=4), "show1": show("use1")})
    assert_passed(comfyui, history)
    assert digests(comfyui.run(first)) == expected


def test_a_loop_that_makes_its_rounds_one_by_one_keeps_its_models(comfyui: ComfyUI) -> None:
    """Three models of 800 MiB on 2000: those of the loop fit, and the third goes for them."""
    loads = {f"load{n}": load(800, seed=20 * n) for n in (1, 2, 3)}  # no layer like another
    for run in range(3):
        models: dict[str, Any] = {"first": ("load1", 0), "second": ("load2", 0)}
        prompt = {
            **loads,
            "before": use("load3", seed=run),
            "loop": node("CarelessRounds", **models, rounds=4, seed=10 * run, after=("before", 0)),
            "show": show("loop"),
        }
        history, moved = comfyui.moved(prompt)
        assert_passed(comfyui, history)
        if run:  # one of the loop's left for the third, and comes home for all of its rounds
            assert moved[0][0] <= 2 * model_bytes(800) + MIB
