"""The nodes as people see them: titles that fit in every language, a report that can be read, in both
node designs; and the words that find them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect

from .tab import Tab
from .test_help import NODES, texts

PLACE_ALL = """types => {
    app.graph.clear()
    for (const [at, type] of types.entries()) {
        const node = LiteGraph.createNode(type)
        node.pos = [60 + (at % 3) * 500, 60 + Math.floor(at / 3) * 330]
        app.graph.add(node)
    }
    app.canvas.ds.scale = 1
    app.canvas.ds.offset = [0, 60]
}"""
# What the next frame writes on the canvas.
WRITTEN = """async () => {
    const written = [], { fillText } = CanvasRenderingContext2D.prototype
    CanvasRenderingContext2D.prototype.fillText = function (text, ...rest) {
        written.push(String(text))
        return fillText.call(this, text, ...rest)
    }
    app.canvas.draw(true, true)
    CanvasRenderingContext2D.prototype.fillText = fillText
    return written
}"""
CUT_OFF = """title => title.scrollWidth > title.clientWidth + 1"""
FOUND = """word => {
    const stores = document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s
    return stores.get('nodeDef').nodeSearchService.searchNode(word).map(found => found.name)
}"""
VUE_NODES = "Comfy.VueNodes.Enabled"


@pytest.fixture(params=["en", "ja", "zh"])
def spoken(tab: Tab, request: pytest.FixtureRequest) -> Iterator[tuple[Tab, str]]:
    """A wide tab in each language."""
    tab.page.set_viewport_size({"width": 1640, "height": 900})
    if request.param != "en":
        tab.server.told("/settings/Comfy.Locale", request.param)
        tab.reload()
    yield tab, request.param
    tab.store(VUE_NODES, False)
    if request.param != "en":
        tab.server.told("/settings/Comfy.Locale", "en")
        tab.reload()


def titles(language: str) -> set[str]:
    return {node["display_name"] for node in texts(language, "nodeDefs").values()}


def test_titles_fit_into_new_nodes_in_both_designs(spoken: tuple[Tab, str]) -> None:
    tab, language = spoken

    tab.run(PLACE_ALL, list(NODES))
    written: set[str] = set(tab.run(WRITTEN))
    tab.screenshot(f"nodes-{language}")

    assert titles(language) <= written
    tab.store(VUE_NODES, True)
    tab.run(PLACE_ALL, list(NODES))
    for title in titles(language):
        shown = tab.page.get_by_text(title, exact=True).first
        expect(shown).to_be_visible()
        assert not shown.evaluate(CUT_OFF), title
    tab.screenshot(f"nodes-{language}-vue")


@pytest.fixture(params=[False, True], ids=["canvas", "vue"])
def designed_tab(tab: Tab, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """A tab in each node design."""
    tab.store(VUE_NODES, request.param)
    yield tab
    tab.store(VUE_NODES, False)


def test_the_memory_report_can_be_read_without_scrolling(designed_tab: Tab) -> None:
    tab = designed_tab
    tab.server.load(("TextEncoder", "nf4", 8), ("Upscaler", "fp16", 34))
    tab.run(PLACE_ALL, ["QMoveReport"])

    tab.run("() => { app.queuePrompt(0) }")

    report = tab.page.locator(".qmove-result")
    expect(report).to_contain_text("Since the start")
    expect(report).to_be_visible()
    size: dict[str, Any] = report.evaluate(
        "e => ({ needed: e.scrollHeight, height: e.clientHeight, wide: e.scrollWidth - e.clientWidth })"
    )
    assert size["needed"] <= size["height"] + 1
    assert size["wide"] <= 1
    tab.screenshot("memory-report")


@pytest.mark.every_frontend("newest", "1.49.6")
def test_the_nodes_are_found_by_what_people_call_it(tab: Tab) -> None:
    for word in ("swap", "free memory", "lowvram", "unload", "offload", "vram"):
        found = [name for name in tab.run(FOUND, word) if name.startswith("QMove")]
        assert {"QMovePark", "QMoveFreeVRAM"} & set(found), word
