"""Help where it is needed: a page for each node, and everything in English, Chinese and Japanese."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from .servers import ROOT
from .tab import Tab

NODES = (
    "QMovePark",
    "QMoveRestore",
    "QMoveMaterialize",
    "QMoveReport",
    "QMoveFreeVRAM",
    "QMovePin",
)


def texts(language: str, part: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{part}.json").read_text(encoding="utf-8"))


def page_of(node: str) -> Path:
    """The page in English, which is that of all languages that have none of their own."""
    folder = ROOT / "web" / "docs"
    return next(file for file in (folder / node / "en.md", folder / f"{node}.md") if file.is_file())


@pytest.mark.parametrize("node", NODES)
def test_the_help_page_of_a_node_opens(tab: Tab, node: str) -> None:
    tab.run(
        """type => {
            app.graph.clear()
            const node = LiteGraph.createNode(type)
            node.pos = [300, 300]
            app.graph.add(node)
            app.canvas.selectNode(node)
            app.canvas.centerOnNode?.(node)
        }""",
        node,
    )

    tab.page.get_by_test_id("info-button").click()

    headings = re.findall(r"^#+ (.+)$", page_of(node).read_text(encoding="utf-8"), re.MULTILINE)
    assert headings
    for heading in headings:
        expect(tab.page.get_by_role("heading", name=heading, exact=True).first).to_be_visible()
    tab.screenshot(f"help-{node}")
    tab.expect_problems(
        re.compile(rf"404 GET .*/docs/{node}/en\.md")
    )  # asked for first, where there is one for all languages


@pytest.fixture(params=["zh", "ja"])
def foreign_tab(tab: Tab, request: pytest.FixtureRequest) -> Iterator[tuple[Tab, str]]:
    tab.server.told("/settings/Comfy.Locale", request.param)
    tab.reload()
    yield tab, request.param
    tab.server.told("/settings/Comfy.Locale", "en")
    tab.reload()


def test_settings_commands_nodes_and_panel_speak_the_users_language(
    foreign_tab: tuple[Tab, str],
) -> None:
    tab, language = foreign_tab
    for key, entry in texts(language, "nodeDefs").items():
        shown = tab.run("type => LiteGraph.registered_node_types[type].title", key)
        assert shown == entry["display_name"]
    tab.open_panel()
    expect(tab.part("park-all")).not_to_have_text("Park all")
    tab.screenshot(f"panel-{language}")
    tab.open_settings()
    english = texts("en", "settings")
    for key, entry in texts(language, "settings").items():
        assert entry["name"] != english[key]["name"]
        expect(tab.page.locator(f'[id="{key.replace("_", ".", 1)}-label"]')).to_contain_text(
            entry["name"]
        )
    tab.screenshot(f"settings-{language}")
