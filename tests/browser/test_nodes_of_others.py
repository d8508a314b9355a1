"""Nothing of ours is added to nodes, of other packs or our own: a saved workflow is byte-equal before
and after ten runs with parking."""

from __future__ import annotations

from typing import Any

import pytest

from .servers import prompt_of
from .tab import Tab
from .test_menus import NEXT_FRAME

RUNS = 10
SMALL = (("TextEncoder", "nf4", 4), ("DiffusionTransformer", "int8", 8), ("Upscaler", "fp16", 17))
SAVED = """() => {
    const workflow = app.graph.serialize()
    delete workflow.extra?.ds  // where the user looks, which the test moves
    return JSON.stringify(workflow)
}"""
FIX_SEEDS = """() => {
    const widgets = app.graph._nodes.flatMap(node => node.widgets ?? [])
    for (const widget of widgets) if (widget.name === 'control_after_generate') widget.value = 'fixed'
}"""
ADD_TO_SEEDS = """number => {
    const widgets = app.graph._nodes.flatMap(node => node.widgets ?? [])
    for (const widget of widgets) if (widget.name === 'seed') widget.value += number
}"""
WIDGETS = "() => app.graph._nodes.map(node => (node.widgets ?? []).map(widget => widget.name))"


@pytest.mark.every_frontend
def test_a_saved_workflow_is_byte_equal_before_and_after_ten_runs(tab: Tab) -> None:
    tab.store("qmove.autoParkWhen", "stage")
    prompt: dict[str, Any] = prompt_of(*SMALL, use=True)
    prompt["201"] = {
        "class_type": "QMovePark",
        "inputs": {"model": ["1", 0], "after": ["103", 0]},
    }
    prompt["202"] = {
        "class_type": "QMoveRestore",
        "inputs": {"model": ["201", 0], "device": "home"},
    }
    tab.run("prompt => app.loadApiJson(prompt, 'test')", prompt)
    tab.run(FIX_SEEDS)
    tab.run(NEXT_FRAME)
    saved, widgets = tab.run(SAVED), tab.run(WIDGETS)
    parked = tab.server.get("/qmove/state")["done"]["parks"]

    for number in range(RUNS):
        tab.run(ADD_TO_SEEDS, 1000 + number)  # so that each of them runs
        queue(tab)
        tab.run(ADD_TO_SEEDS, -1000 - number)

    assert tab.server.get("/qmove/state")["done"]["parks"] >= parked + RUNS
    assert tab.run(WIDGETS) == widgets
    assert tab.run(SAVED) == saved
    tab.screenshot("after-ten-runs")


def queue(tab: Tab) -> None:
    with tab.page.expect_response(
        lambda r: r.url.endswith("/prompt") and r.request.method == "POST"
    ) as answer:
        tab.run("() => { app.queuePrompt(0) }")
    tab.server.result(answer.value.json()["prompt_id"])
    tab.run(NEXT_FRAME)
