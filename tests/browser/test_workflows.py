"""Each example workflow opens: every node is known, every link and widget is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from .builders import OPEN
from .servers import ROOT
from .tab import Tab

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LOADED = """() => ({
    nodes: app.graph._nodes.map(node => node.type),
    unknown: app.graph._nodes.filter(node => !LiteGraph.registered_node_types[node.type]).map(n => n.type),
    links: Object.fromEntries(app.graph._nodes.map(node => [node.id, (node.inputs ?? []).filter(i => i.link != null).length])),
    extra: app.graph._nodes.filter(node => (node.inputs ?? []).some(i => i.link != null && !app.graph.links.get(i.link))).length,
})"""


@pytest.mark.every_frontend("newest", "1.49.6")
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


def test_the_examples_are_offered_among_the_templates(tab: Tab) -> None:
    offered = tab.server.get("/workflow_templates")["qmove"]

    assert sorted(offered) == [file.stem for file in WORKFLOWS]
    assert len(offered) >= 3
