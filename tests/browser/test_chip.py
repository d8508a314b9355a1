"""The chip in the top bar: always there, live, with a menu, and one line under it after a run."""

from __future__ import annotations

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from .builders import ENCODER, TRANSFORMER, UPSCALER
from .servers import prompt_of
from .tab import Tab

LARGE = (
    ("TextEncoder", "nf4", 120),
    ("DiffusionTransformer", "int8", 400),
    ("Upscaler", "fp16", 160),
)


@pytest.mark.every_frontend
def test_it_is_there_without_the_panel_and_follows_the_models(tab: Tab) -> None:
    chip = tab.part("chip")
    expect(chip).to_be_visible()
    tab.server.load_resident(ENCODER, TRANSFORMER)
    expect(chip).to_have_text(re.compile(r"^VRAM 0\.\d/0\.6$"))

    tab.server.told("/qmove/park", {"models": "all"})
    expect(chip).to_have_text("VRAM 0.0/0.6 · 2 parked")
    tab.screenshot("chip")
    chip.click()
    expect(tab.part("panel")).to_be_visible()


@pytest.mark.every_frontend
def test_its_menu_has_the_switch_park_all_and_the_settings(tab: Tab) -> None:
    tab.server.load_resident(UPSCALER)
    tab.part("chip").click(button="right")
    menu = tab.part("chip-menu")
    expect(menu.get_by_role("menuitemcheckbox")).to_have_attribute("aria-checked", "true")
    tab.screenshot("chip-menu")
    assert Axe().run(tab.page, context="[data-testid=qmove-chip-menu]").violations_count == 0

    with tab.page.expect_response("**/qmove/settings"):
        menu.get_by_role("menuitemcheckbox").click()
    assert tab.server.settings()["qmove.autoPark"] is False
    tab.part("chip").click(button="right")
    menu.get_by_text("Park all (unload to RAM)").click()
    expect(tab.part("chip")).to_have_text(re.compile("1 parked"))
    tab.part("chip").click(button="right")
    menu.get_by_text("Settings…").click()
    expect(tab.page.get_by_role("dialog")).to_be_visible()


@pytest.mark.every_frontend
def test_a_setting_hides_it(tab: Tab) -> None:
    tab.store("qmove.chip", False)
    expect(tab.part("chip")).to_be_hidden()
    tab.store("qmove.chip", True)
    expect(tab.part("chip")).to_be_visible()


@pytest.mark.every_frontend
def test_after_a_run_one_line_says_what_was_gained(tab: Tab) -> None:
    tab.server.load(ENCODER, use=True)
    expect(tab.part("chip-line")).to_be_hidden()  # everything fitted: there is nothing to say
    tab.server.forget_models()

    tab.server.run(prompt_of(*LARGE, use=True, first_use=301))

    said = r"^Ran in \d+ MiB instead of \d+ MiB: \d models? stepped aside for [\d.]+ s$"
    expect(tab.part("chip-line")).to_have_text(re.compile(said))
    tab.screenshot("chip-line")
    summary = tab.server.get("/qmove/history")["run"]["summary"]
    assert summary["used"] <= 640 << 20 < summary["wanted"]
    tab.part("chip-line").click()
    expect(tab.part("line")).to_have_text(re.compile(said))
