"""The settings dialog: a change reaches the running server, stays, and shows in every tab; what
failed is taken back and told."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from .tab import LOST, Tab

# By name: the value that a test sets, none of them the default.
CHANGES: dict[str, Any] = {
    "qmove.autoPark": False,
    "qmove.autoParkWhen": "stage",
    "qmove.keepLoaded": False,
    "qmove.keepLoadedLimit": 5,
    "qmove.keepLoadedOwn": True,
    "qmove.keepMirrors": False,
    "qmove.ramLimit": 3,
    "qmove.vramToKeepFree": 2,
    "qmove.idleMinutes": 30,
    "qmove.runAgain": False,
    "qmove.verify": True,
    "qmove.notifications": False,
}


def set_in_dialog(tab: Tab, name: str, value: Any) -> None:
    """Uses the control as a person does, and waits until qmove's and ComfyUI's own routes have
    answered."""
    control = tab.setting(name)
    with (
        tab.page.expect_response(
            lambda r: r.url.endswith("/qmove/settings") and r.request.method == "POST"
        ),
        tab.page.expect_response(lambda r: "/api/settings" in r.url and r.request.method == "POST"),
    ):
        if isinstance(value, bool):
            control.click()
        elif isinstance(value, str):
            control.click()
            tab.page.get_by_role("option", name="At each stage").click()
        else:
            control.click()
            control.press("Control+a")
            control.press_sequentially(str(value))
            control.press("Enter")
            control.press("Tab")


def expect_shown(tab: Tab, name: str, value: Any) -> None:
    control = tab.setting(name)
    if isinstance(value, bool):
        expect(control).to_have_attribute("aria-checked", str(value).lower())
    elif isinstance(value, str):
        tab.page.wait_for_function(
            "([n, v]) => app.extensionManager.setting.get(n) === v", arg=[name, value]
        )
    else:
        expect(control).to_have_value(re.compile(rf"^{value}(\.0+)?\b"))


@pytest.mark.every_frontend
def test_each_setting_reaches_the_running_server_at_once(tab: Tab) -> None:
    tab.open_settings()

    for name, value in CHANGES.items():
        set_in_dialog(tab, name, value)
        assert tab.server.settings()[name] == value
        expect_shown(tab, name, value)


def test_all_settings_are_there_after_a_restart(tab: Tab) -> None:
    tab.open_settings()
    for name, value in CHANGES.items():
        set_in_dialog(tab, name, value)

    tab.server.stop()
    tab.server.start()

    assert tab.server.settings() == CHANGES
    tab.reload().open_settings()
    for name, value in CHANGES.items():
        expect_shown(tab, name, value)
    tab.expect_problems(LOST)


def test_two_open_tabs_agree(tab: Tab, second_tab: Tab) -> None:
    tab.open_settings()
    second_tab.open_settings()

    for name, value in CHANGES.items():
        set_in_dialog(tab, name, value)
        expect_shown(second_tab, name, value)


def test_a_value_that_the_server_refuses_is_taken_back_and_the_reason_told(tab: Tab) -> None:
    status, answer = tab.server.post("/qmove/settings", {"qmove.ramLimit": -1})
    assert status == 400
    tab.open_settings()

    tab.store("qmove.ramLimit", -1)

    expect(tab.toasts.filter(has_text=answer["error"])).to_be_visible()
    expect_shown(tab, "qmove.ramLimit", 0)
    assert tab.server.settings()["qmove.ramLimit"] == 0
    tab.expect_problems(re.compile(r"400 POST .*/qmove/settings"))


def test_a_change_that_finds_no_server_is_taken_back_and_the_reason_told(tab: Tab) -> None:
    tab.open_settings()
    tab.server.stop()

    tab.setting("qmove.autoPark").click()

    expect(tab.toasts.filter(has_text="ComfyUI is not reachable").first).to_be_visible()
    expect_shown(tab, "qmove.autoPark", True)
    tab.screenshot("settings-server-away")
    tab.server.start()
    assert tab.server.settings()["qmove.autoPark"] is True
    tab.reload()
    tab.expect_problems(LOST)


def test_each_setting_says_what_it_costs(tab: Tab) -> None:
    dialog = tab.open_settings()

    for name in CHANGES:
        label = dialog.locator(f'[id="{name}-label"]')
        label.locator("i").hover()
        expect(tab.page.get_by_role("tooltip").first).to_be_visible()
    tab.screenshot("settings-tooltip")
    tab.page.mouse.move(0, 0)
    expect(tab.page.get_by_role("tooltip")).to_have_count(0)
