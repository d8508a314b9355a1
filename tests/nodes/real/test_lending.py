"""A real ComfyUI lends its card to another program and takes it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.nodes.builders.comfyui_process import ComfyUI
from tests.nodes.builders.real_prompts import (
    assert_passed,
    digests,
    load,
    model_bytes,
    needs_comfyui,
    show,
    start,
    use,
)

pytestmark = needs_comfyui
MIB = 1 << 20


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    with start(tmp_path_factory.mktemp("lending"), "256MiB") as comfyui:
        yield comfyui


def prompt(seed: int) -> dict[str, Any]:
    return {"load": load(64), "use": use("load", seed=seed), "show": show("use")}


def models(comfyui: ComfyUI) -> list[dict[str, Any]]:
    return [m for m in comfyui.get("/qmove/state")["models"] if m["nbytes"] == model_bytes(64)]


def test_the_card_is_lent_and_taken_back_and_outputs_stay_equal(comfyui: ComfyUI) -> None:
    first = comfyui.run(prompt(1))
    assert_passed(comfyui, first)

    status, released = comfyui.post("/qmove/release", {})

    assert status == 200, released
    device = released["devices"][0]
    assert (device["name"], device["stayed"], device["held"]) == ("cuda:0", [], 0)
    assert device["free"] == device["total"]
    assert device["freed"] >= model_bytes(64)
    (model,) = models(comfyui)
    assert model["state"] == "parked"

    status, answer = comfyui.post("/qmove/take_back", {})

    assert status == 202, answer
    assert [part["nbytes"] for part in answer["began"]] == [model_bytes(64)]
    comfyui.until(lambda: models(comfyui)[0]["state"] == "resident", "has taken it back")
    again = comfyui.run({**prompt(2), "show": show("use")})
    assert_passed(comfyui, again)
    assert digests(comfyui.run(prompt(1))) == digests(first)


def test_a_release_during_a_prompt_waits_for_a_node_and_the_prompt_passes(
    comfyui: ComfyUI,
) -> None:
    for seed in range(10, 14):
        running = comfyui.submit(prompt(seed))
        status, released = comfyui.post("/qmove/release", {})
        assert status == 200, released
        assert released["devices"][0]["stayed"] == []
        assert_passed(comfyui, comfyui.result(running))
