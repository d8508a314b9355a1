"""A run and its moves, watched sample by sample against the simulated device's own counters: the panel
is never more than a second behind. And two workflows in two tabs, whose nodes have the same ids."""

from __future__ import annotations

import itertools
import os
import re
import time
from typing import Any

import pytest
from playwright.sync_api import expect

from .builders import BIG, ENCODER, HALF, TRANSFORMER, expect_state
from .servers import prompt_of
from .tab import Tab
from .test_menus import open_node_menu, run_in_browser

SECOND = 1.0
MIB = 1 << 20
# What the panel shows of a GPU, in MiB, and what stands in the list.
SHOWN = """() => {
    const bar = document.querySelector('[data-testid="qmove-bar-cuda:0"]')?.getAttribute('aria-label') ?? ''
    const used = bar.match(/: ([\\d.]+) (B|KiB|MiB|GiB) of/)
    const unit = { B: 2 ** -20, KiB: 2 ** -10, MiB: 1, GiB: 1024 }
    return used ? Number(used[1]) * unit[used[2]] : null
}"""


@pytest.mark.skipif(
    "QMOVE_WATCH" not in os.environ,
    reason="it measures time, so that it needs a machine that does nothing else: QMOVE_WATCH=1",
)
def test_the_bars_are_never_more_than_a_second_behind_the_device(tab: Tab) -> None:
    """While models are loaded, parked for each other, and used."""
    tab.open_panel()
    tab.store("qmove.autoParkWhen", "stage")
    large = [(f"Model{number}", "fp16", 119) for number in range(4)]
    prompt = tab.server.post("/prompt", {"prompt": prompt_of(*large, use=True)})[1]["prompt_id"]

    samples: list[tuple[float, float, float | None]] = []  # when, the device, the panel; MiB
    ended: float | None = None
    while ended is None or time.monotonic() < ended + 2 * SECOND:
        used = tab.server.get("/stagehand/memory")["allocated"][0] / MIB
        samples.append((time.monotonic(), used, tab.run(SHOWN)))
        if ended is None and tab.server.get(f"/history/{prompt}"):
            ended = time.monotonic()

    assert max(used for _, used, _ in samples) > 100
    # A busy machine answers late, and not only the panel: as late as that may be is no fault of it.
    slack = max(later[0] - sample[0] for sample, later in itertools.pairwise(samples))
    late = [sample for sample in samples if not was_true(samples, SECOND + 2 * slack, *sample)]
    assert late == [], f"{len(late)} of {len(samples)} samples, with {slack} s of slack"


def was_true(
    samples: list[tuple[float, float, float | None]],
    within: float,
    at: float,
    used: float,
    shown: float | None,
) -> bool:
    """Whether what is shown was so within so many seconds before: it lies between the least and the
    most that the device had then."""
    lately = [u for when, u, _ in samples if at - within <= when <= at]
    before = [u for when, u, _ in samples if when < at - within][-1:]  # the value as it began
    known = [*before, *lately]
    return shown is None or min(known) - 2 <= shown <= max(known) + 2


def test_in_the_middle_of_a_move_the_panel_shows_the_model_and_what_is_free(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(BIG)
    tab.server.hold_copies(after_bytes=HALF)
    tab.row("DiffusionTransformer").get_by_test_id("qmove-park").click()
    expect(tab.part("progress")).to_be_visible()

    expect(tab.row("DiffusionTransformer")).to_have_attribute("data-state", "busy")
    allocated = tab.server.allocated() / MIB
    tab.page.wait_for_function(f"() => Math.abs(({SHOWN})() - {allocated}) < 2")
    tab.server.let_copies_go()
    expect_state(tab, "DiffusionTransformer", "parked")


def test_models_are_listed_with_auto_parking_off(tab: Tab) -> None:
    tab.open_panel()
    tab.store("qmove.autoPark", False)
    expect(tab.part("auto-park")).not_to_be_checked()
    tab.server.load(ENCODER, TRANSFORMER, use=True)
    expect(tab.part("model-row")).to_have_count(2)
    tab.row("TextEncoder").get_by_test_id("qmove-park").click()
    expect_state(tab, "TextEncoder", "parked")


def test_the_switch_follows_the_dialog_and_other_tabs_at_once(tab: Tab, second_tab: Tab) -> None:
    tab.open_panel()
    second_tab.open_panel()
    for value in (False, True):
        second_tab.store("qmove.autoPark", value)
        for each in (second_tab, tab):
            expect(each.part("auto-park")).to_be_checked(checked=value)


def load_workflow(tab: Tab, title: str, mib: int) -> Any:
    """Runs a workflow of this tab whose loader is node 1; returns the workflow's id."""
    model = (f"Of{title}", "nf4", mib)
    prompt = prompt_of(model)
    prompt["1"]["_meta"] = {"title": title}
    run_in_browser(tab, prompt)
    return tab.run("() => String((app.rootGraph ?? app.graph).id)")


def test_two_workflows_in_two_tabs_have_the_same_ids_and_other_models(
    tab: Tab, second_tab: Tab
) -> None:
    tab.open_panel()
    first = load_workflow(tab, "Captioner", 24)
    second = load_workflow(second_tab, "Segmenter", 32)
    assert first != second
    tab.server.told("/qmove/restore", {"models": "all"})
    menus = tab.server.get("/qmove/state")["menus"]
    of_loaders = {menu["workflow"]: menu["title"] for menu in menus if menu["node"] == "1"}
    assert of_loaders[first] == "Captioner"
    assert of_loaders[second] == "Segmenter"

    open_node_menu(tab, 1)
    tab.page.get_by_text("Park this model now").click()
    expect_state(tab, "OfCaptioner", "parked")
    expect_state(tab, "OfSegmenter", "resident")

    second_tab.run(
        "() => { const node = app.graph.getNodeById(1); node.title = 'Renamed' }"
    )  # in its own tab only
    expect(tab.part("panel")).to_contain_text("Segmenter")
    expect(tab.part("panel")).not_to_contain_text("Renamed")


def test_out_of_vram_says_why_and_what_helps_and_that_helps(tab: Tab) -> None:
    tab.open_panel()
    tab.store("qmove.autoPark", False)
    large = [("Captioner", "fp16", 408), ("Segmenter", "fp16", 408)]
    run_in_browser(tab, prompt_of(*large, use=True))

    toast = tab.part("toast")
    expect(toast).to_contain_text("Out of VRAM")
    expect(toast).to_contain_text("Captioner")
    expect(tab.part("failure")).to_contain_text("Out of VRAM")
    expect(tab.part("chip")).to_have_attribute("data-state", "failed")
    expect(toast).not_to_contain_text(re.compile(r"torch\.|PYTORCH_|qmove\."))
    tab.page.keyboard.press("Escape")  # ComfyUI's own dialog about the error
    tab.screenshot("out-of-vram")

    with tab.page.expect_response(
        lambda r: r.url.endswith("/prompt") and r.request.method == "POST"
    ) as answer:
        tab.part("failure-act").click()  # it turns auto-parking on, too
    result = tab.server.result(answer.value.json()["prompt_id"])
    assert result["status"]["status_str"] == "success"
    expect(tab.part("failure")).to_have_count(0)
