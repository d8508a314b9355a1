"""How it looks, and whether it can be used without a mouse, on a narrow screen and by a screen
reader; with pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from .builders import BIG, ENCODER, HALF, OPEN, TRANSFORMER, expect_state
from .servers import prompt_of
from .tab import Tab

OVERFLOWING = """panel => {
    const sidebar = []
    for (let e = panel; e && e.querySelectorAll('*').length < 400; e = e.parentElement) sidebar.push(e)
    const cut = e => e.clientWidth && e.scrollWidth > e.clientWidth + 1
    const inside = [...panel.querySelectorAll('*')].filter(e => getComputedStyle(e).overflowX !== 'hidden')
    return [...sidebar, ...inside].filter(cut).map(e => `${e.scrollWidth} > ${e.clientWidth}: ${e.outerHTML.slice(0, 200)}`)
}"""
# What is cut off in a panel that was made narrow, though it is not meant to be.
CUT = """panel => [...panel.querySelectorAll('*')]
    .filter(e => getComputedStyle(e).overflowX !== 'hidden' && e.clientWidth && e.scrollWidth > e.clientWidth + 1)
    .map(e => `${e.scrollWidth} > ${e.clientWidth}: ${e.outerHTML.slice(0, 200)}`)"""
# Whether the labels of the chart's axis, which stand left of its lines, are light (on a dark theme)
# or dark.
LABELS_STAND_OUT = """dark => {
    const canvas = document.querySelector('[data-testid=qmove-chart] canvas')
    if (!canvas?.width) return false
    const { data } = canvas.getContext('2d').getImageData(0, 0, 56 * devicePixelRatio, canvas.height)
    const drawn = []
    for (let i = 0; i < data.length; i += 4) if (data[i + 3] > 200) drawn.push(data[i + 1])
    return drawn.length > 0 && (dark ? Math.max(...drawn) > 140 : Math.min(...drawn) < 115)
}"""
THREE = (
    ("TextEncoder", "nf4", 120),
    ("DiffusionTransformer", "int8", 400),
    ("Upscaler", "fp16", 160),
)


@pytest.fixture
def themed_tab(tab: Tab) -> Iterator[Tab]:
    """A tab that gets its dark theme back."""
    yield tab
    tab.use_theme("dark")


def assert_accessible(tab: Tab) -> None:
    found = Axe().run(tab.page, context="[data-testid=qmove-panel]")
    assert found.violations_count == 0, found.generate_report()


def in_both_themes(tab: Tab, name: str, *, accessible: bool = True) -> dict[str, Path]:
    """Takes a picture in each theme, and lets axe look for what a screen reader or weak eyes would
    stumble over."""
    pictures = {}
    for theme in ("dark", "light"):
        tab.use_theme(theme)
        pictures[theme] = tab.screenshot(f"{name}-{theme}")
        if accessible:
            assert_accessible(tab)
    return pictures


def test_the_panel_without_models_in_both_themes(themed_tab: Tab) -> None:
    themed_tab.open_panel()
    expect(themed_tab.part("empty")).to_be_visible()

    in_both_themes(themed_tab, "panel-empty")


def test_the_panel_while_a_model_moves_in_both_themes(themed_tab: Tab) -> None:
    tab = themed_tab
    tab.open_panel()
    tab.server.load(BIG)
    expect_state(tab, "DiffusionTransformer", "resident")
    tab.server.hold_copies(after_bytes=HALF)

    tab.row("DiffusionTransformer").get_by_test_id("qmove-park").click()
    expect(tab.part("progress-text")).to_contain_text("iB/s")

    in_both_themes(tab, "panel-moving")
    tab.server.let_copies_go()
    expect_state(tab, "DiffusionTransformer", "parked")
    expect(tab.part("status")).to_contain_text("went to RAM")


def test_the_panel_after_a_run_in_both_themes(themed_tab: Tab, picture_for_readme: Any) -> None:
    """Three stages whose models leave the VRAM one after the other, beside the workflow that does
    so with real ones."""
    tab = themed_tab
    tab.page.set_viewport_size({"width": 1280, "height": 1130})
    tab.run(OPEN, "Three models on one GPU")
    tab.run(
        "() => { app.canvas.ds.offset = [430, 90]; app.canvas.ds.scale = 0.85; app.canvas.setDirty(true, true) }"
    )
    tab.store("qmove.autoParkWhen", "stage")
    tab.open_panel()

    tab.server.run(prompt_of(*THREE, use=True))

    expect_state(tab, "TextEncoder", "parked")
    expect_state(tab, "DiffusionTransformer", "parked")
    expect_state(tab, "Upscaler", "resident")
    expect(tab.row("Upscaler")).to_contain_text("used just now")
    expect(tab.part("chart").locator("canvas").first).to_be_visible()
    for theme, picture in in_both_themes(tab, "panel").items():
        picture_for_readme(picture, f"panel-{theme}.png")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_the_chart_has_the_colours_of_the_theme_also_in_a_page_that_has_just_loaded(
    themed_tab: Tab, theme: str
) -> None:
    tab = themed_tab
    tab.use_theme(theme)
    tab.server.load(ENCODER)

    tab.reload().open_panel()

    tab.page.wait_for_function(LABELS_STAND_OUT, arg=theme == "dark")


def test_the_settings_in_both_themes(themed_tab: Tab) -> None:
    dialog = themed_tab.open_settings()

    expect(dialog.get_by_role("switch").first).to_be_visible()
    in_both_themes(themed_tab, "settings", accessible=False)  # the dialog is the frontend's


TWENTY = tuple(
    (f"{family}-a-name-as-long-as-people-give-them-{n:02d}.Q4_K_M.safetensors", "fp16", 17)
    for n, family in enumerate(("flux-dev", "wan-2.2-t2v", "t5-xxl", "qwen-image") * 5)
)
HEIGHT_OF_A_LINE = 40  # pixels, at most


@pytest.mark.parametrize("width", [210, 360])
def test_twenty_models_with_long_names_have_one_line_each(themed_tab: Tab, width: int) -> None:
    tab = themed_tab
    tab.open_panel()
    tab.page.set_viewport_size({"width": 1280, "height": 1500})
    tab.server.load(*TWENTY)
    expect(tab.part("model-row")).to_have_count(20)
    panel = tab.part("panel")
    panel.evaluate("(panel, width) => { panel.style.width = `${width}px` }", width)

    assert panel.evaluate(CUT) == []
    for row in tab.part("model-row").all():
        box = row.bounding_box()
        assert box is not None
        assert box["height"] <= HEIGHT_OF_A_LINE
        for control in ("model-name", "park", "restore", "pin"):
            inside = row.get_by_test_id(f"qmove-{control}").bounding_box()
            assert inside is not None, control
            assert inside["width"] >= 24, control
            assert inside["x"] + inside["width"] <= box["x"] + box["width"] + 1, control
    narrowest = tab.part("bar-cuda:0").evaluate(
        "bar => Math.min(...[...bar.children].slice(0, -1).map(part => part.getBoundingClientRect().width))"
    )
    assert narrowest >= 2
    tab.part("search").fill("t5-xxl")
    expect(tab.part("model-row")).to_have_count(5)
    tab.part("search").fill("")
    panel.evaluate("panel => { panel.style.background = 'var(--comfy-menu-bg)' }")
    in_both_themes(tab, f"panel-twenty-{width}")
    panel.evaluate("panel => panel.removeAttribute('style')")


def test_a_move_shifts_nothing(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(BIG)
    expect_state(tab, "DiffusionTransformer", "resident")

    places = """() => [...document.querySelectorAll('.qmove-panel h3, .qmove-panel .qmove-bar')]
        .map(part => part.getBoundingClientRect().top - document.querySelector('.qmove-panel h2').getBoundingClientRect().top)"""
    before = tab.run(places)
    tab.server.hold_copies(after_bytes=HALF)
    tab.row("DiffusionTransformer").get_by_test_id("qmove-park").click()
    expect(tab.part("progress")).to_be_visible()
    assert len(before) >= 5
    assert tab.run(places)[:4] == before[:4]  # below them is what is listed
    tab.server.let_copies_go()
    expect_state(tab, "DiffusionTransformer", "parked")
    assert tab.run(places)[:2] == before[:2]


def test_the_chart_says_the_figures_under_the_mouse(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(ENCODER, TRANSFORMER, use=True)
    over = tab.part("chart").locator(".u-over")
    over.scroll_into_view_if_needed()
    over.hover()
    expect(tab.part("chart-tip")).to_contain_text(re.compile(r"cuda:0: [\d.]+ MiB"))
    tab.screenshot("panel-chart-hover")
    tab.page.mouse.move(700, 5)
    expect(tab.part("chart-tip")).to_be_hidden()


def test_the_panel_fits_a_screen_of_360_pixels(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(ENCODER, TRANSFORMER)
    expect(tab.part("model-row")).to_have_count(2)

    tab.page.set_viewport_size({"width": 360, "height": 740})

    panel = tab.part("panel")
    expect(panel).to_be_visible()
    assert panel.evaluate(OVERFLOWING) == []
    for name in ("park-all", "free", "free-gib"):
        part = tab.part(name)
        part.scroll_into_view_if_needed()
        box = part.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360, (name, box)
    tab.screenshot("panel-360")


def test_the_keyboard_alone_opens_the_panel_cancels_parks_and_restores(tab: Tab) -> None:
    tab.server.load(BIG)
    keyboard = tab.page.keyboard
    tab.sidebar_button.focus()
    keyboard.press("Enter")
    expect(tab.part("panel")).to_be_visible()
    expect_state(tab, "DiffusionTransformer", "resident")

    tab.server.hold_copies(after_bytes=HALF)
    press_on(tab, "park-all")
    expect(tab.part("progress")).to_be_visible()
    with tab.page.expect_response("**/qmove/cancel"):
        press_on(tab, "cancel")
    tab.server.let_copies_go()
    expect_state(tab, "DiffusionTransformer", "resident")

    press_on(tab, "park")
    expect_state(tab, "DiffusionTransformer", "parked")
    press_on(tab, "restore")
    expect_state(tab, "DiffusionTransformer", "resident")
    tab.expect_problems(re.compile(r"409 POST .*/qmove/park"))


def press_on(tab: Tab, part: str) -> None:
    """Tabs from where the focus is until it is on this part, and presses Enter."""
    focused = "() => document.activeElement?.getAttribute('data-testid')"
    for _ in range(150):
        tab.page.keyboard.press("Tab")
        if tab.run(focused) == f"qmove-{part}":
            assert tab.run("() => document.activeElement.matches(':focus-visible')")
            tab.page.keyboard.press("Enter")
            return
    raise AssertionError(f"Tab does not reach {part}")
