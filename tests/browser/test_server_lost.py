"""The server goes away and comes back while the panel is open."""

from __future__ import annotations

import re

from playwright.sync_api import Route, expect

from .builders import ENCODER, expect_state
from .tab import LOST, Tab


def test_the_panel_says_that_the_server_is_away_and_goes_on_when_it_is_back(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(ENCODER)
    expect_state(tab, "TextEncoder", "resident")

    tab.server.stop()
    expect(tab.part("error")).to_be_visible()
    tab.screenshot("panel-server-away")
    tab.server.start()

    expect(tab.part("error")).to_be_hidden()
    expect(tab.part("model-row")).to_have_count(0)  # a new process knows no model
    tab.server.load(ENCODER)
    expect_state(tab, "TextEncoder", "resident")
    tab.expect_problems(LOST)


def test_a_panel_opened_without_a_server_says_so_and_comes_to_life_with_it(tab: Tab) -> None:
    tab.server.stop()
    tab.open_panel()
    expect(tab.part("error")).to_be_visible()

    tab.server.start()

    expect(tab.part("error")).to_be_hidden()
    expect(tab.part("empty")).to_be_visible()
    tab.expect_problems(LOST)


def test_the_panel_says_that_it_loads_what_went_wrong_and_tries_again_when_asked_to(
    tab: Tab,
) -> None:
    asked: list[Route] = []
    state = re.compile(r"/qmove/state$")
    tab.page.route(state, lambda route: asked.append(route))
    tab.reload().open_panel()
    expect(tab.part("loading")).to_be_visible()
    tab.screenshot("panel-loading")

    for route in asked:
        route.fulfill(status=500, json={"error": "The GPU has fallen off the bus."})
    expect(tab.part("error")).to_contain_text("fallen off the bus")
    tab.screenshot("panel-error")

    tab.page.unroute(state)
    tab.part("retry").click()

    expect(tab.part("error")).to_be_hidden()
    expect(tab.part("empty")).to_be_visible()
    tab.expect_problems(re.compile(r"500 GET .*/qmove/state"))
