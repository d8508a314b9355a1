"""Node menu, commands with their keys, what the nodes themselves show, and the about page."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import expect

from .builders import ENCODER, TRANSFORMER, expect_state
from .servers import prompt_of
from .tab import Tab

WHERE = """id => {
    const node = app.graph.getNodeById(id), box = app.canvas.canvas.getBoundingClientRect(), view = app.canvas.ds
    return [box.x + (node.pos[0] + 60 + view.offset[0]) * view.scale, box.y + (node.pos[1] - 12 + view.offset[1]) * view.scale]
}"""


NEXT_FRAME = """() => new Promise(drawn => {
    app.canvas.setDirty(true, true)
    requestAnimationFrame(() => requestAnimationFrame(drawn))
})"""


def run_in_browser(tab: Tab, prompt: dict[str, Any]) -> None:
    """Puts a prompt on the canvas and presses Run, so that the nodes on the canvas are those that
    run."""
    tab.run("prompt => app.loadApiJson(prompt, 'test')", prompt)
    tab.run(
        "() => { app.canvas.ds.offset = [420, 160]; app.canvas.ds.scale = 0.8; app.canvas.setDirty(true, true) }"
    )
    with tab.page.expect_response(
        lambda r: r.url.endswith("/prompt") and r.request.method == "POST"
    ) as answer:
        tab.run("() => { app.queuePrompt(0) }")
    tab.server.result(answer.value.json()["prompt_id"])


def open_node_menu(tab: Tab, node: int) -> None:
    x, y = tab.run(WHERE, node)
    tab.page.mouse.click(x, y, button="right")


@pytest.mark.every_frontend("newest", "1.49.6")
def test_the_menu_of_a_node_parks_and_restores_its_model(tab: Tab) -> None:
    tab.open_panel()
    run_in_browser(tab, prompt_of(ENCODER))
    expect_state(tab, "TextEncoder", "resident")

    open_node_menu(tab, 1)
    tab.screenshot("node-menu")
    tab.page.get_by_text("Park this model now").click()
    expect_state(tab, "TextEncoder", "parked")

    open_node_menu(tab, 1)
    expect(tab.page.get_by_text("Park this model now")).to_have_count(0)  # nothing is left to park
    tab.page.get_by_text("Restore this model (load back)").click()
    expect_state(tab, "TextEncoder", "resident")


@pytest.mark.every_frontend("1.27.10")
def test_an_old_frontend_gets_no_entries_and_no_error(tab: Tab) -> None:
    run_in_browser(tab, prompt_of(ENCODER))

    open_node_menu(tab, 1)

    expect(tab.page.locator(".litecontextmenu")).to_be_visible()
    expect(tab.page.get_by_text("Park this model now")).to_have_count(0)
    tab.page.keyboard.press("Escape")
    tab.run("() => document.querySelectorAll('.litecontextmenu').forEach(menu => menu.remove())")


@pytest.mark.every_frontend
def test_a_key_parks_all_models(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load_resident(ENCODER, TRANSFORMER)
    expect(tab.part("model-row")).to_have_count(2)
    tab.page.locator("canvas").first.focus()

    tab.page.keyboard.press("Alt+Shift+P")

    expect_state(tab, "TextEncoder", "parked")
    expect_state(tab, "DiffusionTransformer", "parked")


def test_a_key_frees_vram(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(TRANSFORMER)
    tab.page.locator("canvas").first.focus()

    tab.page.keyboard.press("Alt+Shift+F")
    dialog = tab.page.get_by_role("dialog")
    expect(dialog).to_contain_text("How many GiB")
    expect(dialog.get_by_role("textbox")).to_be_focused()
    tab.page.keyboard.type("1024")  # more than there is
    tab.page.keyboard.press("Enter")

    expect_state(tab, "DiffusionTransformer", "parked")
    expect(tab.toasts.filter(has_text="Less VRAM is free than asked for")).to_be_visible()
    tab.expect_problems(re.compile(r"409 POST .*/qmove/free"))  # less was freed: no success


@pytest.mark.every_frontend
def test_the_commands_stand_in_the_menu_and_say_their_keys(tab: Tab) -> None:
    commands = tab.run(
        "() => app.extensionManager.command.commands.filter(c => c.id.startsWith('qmove.')).map(c => c.id)"
    )

    assert sorted(commands) == ["qmove.freeVram", "qmove.parkAll", "qmove.showPanel"]


@pytest.mark.every_frontend
def test_a_park_node_shows_what_it_did(tab: Tab) -> None:
    prompt = prompt_of(ENCODER)
    prompt["5"] = {"class_type": "QMovePark", "inputs": {"model": ["1", 0], "after": ["101", 0]}}

    run_in_browser(tab, prompt)

    shown = "() => app.graph.getNodeById(5).widgets?.map(widget => String(widget.value)).join(' ')"
    tab.page.wait_for_function(f"() => /Parked TextEncoder/.test(({shown})())")
    tab.run(NEXT_FRAME)
    tab.screenshot("node-result")


@pytest.mark.every_frontend
def test_the_about_page_names_the_version_and_links_to_it(tab: Tab) -> None:
    tab.command("Comfy.Help.AboutComfyUI")

    badge = tab.page.get_by_role("dialog").get_by_text(re.compile(r"qmove v?\d+\.\d+\.\d+"))

    expect(badge).to_be_visible()
