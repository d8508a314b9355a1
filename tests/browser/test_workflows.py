"""Each template opens, in every frontend: all nodes are known, every link and widget is there. Each
one runs, and has a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import expect

from .builders import OPEN
from .servers import ROOT
from .tab import Tab

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
REPORTING = {"QMovePark", "QMoveRestore", "QMoveReport", "QMoveFreeVRAM", "QMovePin"}
FIT = """() => {
    const boxes = [...app.graph._nodes, ...app.graph._groups].map(part => [...part.pos, part.pos[0] + part.size[0], part.pos[1] + part.size[1]])
    const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])) - 30)
    const [right, bottom] = [2, 3].map(i => Math.max(...boxes.map(box => box[i])) + 30)
    const scale = Math.min(innerWidth / (right - left), innerHeight / (bottom - top))
    const { ds } = app.canvas
    ds.scale = scale
    ds.offset = [(innerWidth / scale - right - left) / 2, (innerHeight / scale - bottom - top) / 2]
    app.canvas.setDirty(true, true)
}"""
LOADED = """() => ({
    nodes: app.graph._nodes.map(node => node.type),
    unknown: app.graph._nodes.filter(node => !LiteGraph.registered_node_types[node.type]).map(n => n.type),
    links: Object.fromEntries(app.graph._nodes.map(node => [node.id, (node.inputs ?? []).filter(i => i.link != null).length])),
    extra: app.graph._nodes.filter(node => (node.inputs ?? []).some(i => i.link != null && !app.graph.links.get(i.link))).length,
})"""


@pytest.mark.every_frontend
@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_workflow_opens_whole(tab: Tab, file: Path) -> None:
    saved = json.loads(file.read_text(encoding="utf-8"))

    tab.run(OPEN, file.stem)

    loaded = tab.run(LOADED)
    assert sorted(loaded["nodes"]) == sorted(node["type"] for node in saved["nodes"])
    assert loaded["unknown"] == []
    linked = {
        str(n["id"]): sum(i.get("link") is not None for i in n.get("inputs", []))
        for n in saved["nodes"]
    }
    assert loaded["links"] == linked
    assert loaded["extra"] == 0
    expect(tab.page.get_by_text("Missing Node Packs")).to_have_count(0)
    tab.screenshot(f"workflow-{file.stem}")


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_template_runs_as_it_was_opened(
    tab: Tab, file: Path, request: pytest.FixtureRequest
) -> None:
    tab.page.set_viewport_size({"width": 1600, "height": 1000})
    tab.run(OPEN, file.stem)
    before = set(tab.server.get("/history"))

    tab.run("() => { app.queuePrompt(0) }")
    while not (ended := set(tab.server.get("/history")) - before):
        tab.page.wait_for_timeout(100)

    (run,) = (tab.server.get("/history")[prompt] for prompt in ended)
    assert run["status"]["status_str"] == "success", tab.server.tail()
    results = tab.page.locator(".qmove-result")
    expect(results.first).not_to_be_empty()
    shown = {node["type"] for node in json.loads(file.read_text())["nodes"]} & REPORTING
    expect(results).to_have_count(len(shown))
    picture = _picture_of_the_graph(tab, file.stem)
    if request.config.getoption("--update-screenshots", default=False):
        with Image.open(picture) as taken:
            taken.convert("RGB").resize((640, 400)).save(file.with_suffix(".jpg"), quality=82)


def _picture_of_the_graph(tab: Tab, name: str) -> Path:
    """The graph alone, as large as it fits, without menus."""
    tab.command("Workspace.ToggleFocusMode")
    tab.run(FIT)
    tab.page.wait_for_timeout(500)  # the nodes' texts follow the graph frame by frame
    picture = tab.screenshot(f"template-{name}")
    tab.command("Workspace.ToggleFocusMode")
    return picture


def test_the_examples_are_offered_among_the_templates(tab: Tab) -> None:
    offered = tab.server.get("/workflow_templates")["qmove"]

    assert sorted(offered) == [file.stem for file in WORKFLOWS]
    assert len(offered) >= 3
