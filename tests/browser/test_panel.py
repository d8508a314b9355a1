"""The memory panel: what is where, live, and the buttons that move it."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from .builders import BIG, ENCODER, HALF, TRANSFORMER, UPSCALER, expect_state
from .servers import prompt_of
from .tab import Tab

GIB = 1 << 30


@pytest.mark.every_frontend
def test_a_park_and_a_restore_are_seen_and_the_model_is_the_same_after_them(tab: Tab) -> None:
    tab.open_panel()
    expect(tab.part("empty")).to_be_visible()
    before = tab.server.load(TRANSFORMER, use=True)["outputs"]["101"]["text"]
    full = tab.server.allocated()
    expect_state(tab, "DiffusionTransformer", "resident")
    expect(tab.row("DiffusionTransformer")).to_contain_text("int8")

    tab.row("DiffusionTransformer").get_by_test_id("qmove-park").click()
    expect_state(tab, "DiffusionTransformer", "parked")
    assert tab.server.allocated() == full - tab.server.models()["DiffusionTransformer"]["nbytes"]

    tab.row("DiffusionTransformer").get_by_test_id("qmove-restore").click()
    expect_state(tab, "DiffusionTransformer", "resident")
    assert tab.server.allocated() == full
    again = tab.server.run(prompt_of(TRANSFORMER, use=True, first_use=201))
    assert again["outputs"]["201"]["text"] == before


@pytest.mark.every_frontend
def test_a_pin_is_chosen_in_the_row_and_lasts_when_the_page_is_loaded_again(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load_resident(ENCODER, TRANSFORMER)
    pin = tab.row("DiffusionTransformer").get_by_test_id("qmove-pin")

    pin.select_option("pinned: never parked")
    park = tab.row("DiffusionTransformer").get_by_test_id("qmove-park")
    expect(park).to_have_attribute("aria-disabled", "true")
    tab.reload().open_panel()
    expect(pin).to_have_value("pin")
    tab.part("park-all").click()

    expect_state(tab, "TextEncoder", "parked")
    expect_state(tab, "DiffusionTransformer", "resident")
    pin.select_option("not pinned")
    park.click()
    expect_state(tab, "DiffusionTransformer", "parked")


def test_the_bars_follow_the_models(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load_resident(ENCODER, TRANSFORMER)
    gpu, ram = tab.part("bar-cuda:0"), tab.part("bar-ram")
    expect(gpu).to_have_accessible_name(re.compile(r"DiffusionTransformer \d"))
    expect(gpu).to_have_accessible_name(re.compile(r"TextEncoder \d"))
    expect(tab.part("bar-cuda:1")).to_be_visible()

    tab.row("DiffusionTransformer").get_by_test_id("qmove-park").click()

    expect(gpu).not_to_have_accessible_name(re.compile("DiffusionTransformer"))
    expect(ram).to_have_accessible_name(re.compile("DiffusionTransformer"))


def test_a_row_tells_kind_size_home_and_last_use(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(ENCODER, use=True)

    row = tab.row("TextEncoder")

    expect(row).to_contain_text("nf4")
    expect(row).to_contain_text(re.compile(r"\d MiB"))
    expect(row).to_contain_text("cuda:0")
    expect(row).to_contain_text(re.compile(r"used|now|ago", re.IGNORECASE))


def test_park_all_parks_every_model(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(ENCODER, TRANSFORMER, UPSCALER)
    expect(tab.part("model-row")).to_have_count(3)

    tab.part("park-all").click()

    for name, _kind, _mib in (ENCODER, TRANSFORMER, UPSCALER):
        expect_state(tab, name, "parked")
    assert all(not model["resident"] for model in tab.server.models().values())


def test_free_gib_parks_no_more_than_it_takes(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load_resident(ENCODER, TRANSFORMER)
    free = next(
        d["free"] for d in tab.server.get("/qmove/state")["devices"] if d["name"] == "cuda:0"
    )
    expect(tab.part("model-row")).to_have_count(2)

    tab.part("free-gib").fill(f"{(free + (1 << 20)) / GIB:.4f}")
    tab.part("free").click()

    expect(tab.part("status")).to_contain_text("went to RAM")
    states = sorted(model["state"] for model in tab.server.models().values())
    assert states == ["parked", "resident"]


def test_a_park_is_cancelled_in_the_middle_and_nothing_has_moved(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(BIG)
    full = tab.server.allocated()
    tab.server.hold_copies(after_bytes=HALF)

    tab.row("DiffusionTransformer").get_by_test_id("qmove-park").click()
    expect(tab.part("progress")).to_be_visible()
    expect(tab.part("progress-text")).to_contain_text(re.compile(r"^[1-9].* MiB of \d+ MiB"))
    tab.screenshot("panel-parking")
    with tab.page.expect_response("**/qmove/cancel"):
        tab.part("cancel").click()
    tab.server.let_copies_go()

    expect_state(tab, "DiffusionTransformer", "resident")
    expect(tab.part("progress")).to_have_count(0)
    expect(tab.part("status")).to_contain_text(re.compile("cancel", re.IGNORECASE))
    assert tab.server.allocated() == full
    assert tab.server.models()["DiffusionTransformer"]["parked"] == {}
    tab.expect_problems(re.compile(r"409 POST .*/qmove/park"))


def test_a_restore_is_cancelled_in_the_middle_and_the_model_stays_parked(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(BIG)
    tab.part("park-all").click()
    expect_state(tab, "DiffusionTransformer", "parked")
    left = tab.server.allocated()
    tab.server.hold_copies(after_bytes=HALF)

    tab.row("DiffusionTransformer").get_by_test_id("qmove-restore").click()
    with tab.page.expect_response("**/qmove/cancel"):
        tab.part("cancel").click()
    tab.server.let_copies_go()

    expect(tab.part("progress")).to_have_count(0)
    expect_state(tab, "DiffusionTransformer", "parked")
    assert tab.server.allocated() == left
    tab.expect_problems(re.compile(r"409 POST .*/qmove/restore"))


def test_the_vram_of_the_last_run_is_drawn_with_its_stages(tab: Tab) -> None:
    tab.open_panel()
    tab.server.load(ENCODER, TRANSFORMER, use=True)

    chart = tab.part("chart")

    expect(chart.locator("canvas").first).to_be_visible()
    expect(tab.part("chart-empty")).to_be_hidden()
    run = tab.server.get("/qmove/history")["run"]
    assert [stage["node"] for stage in run["stages"]] == ["1", "101", "2", "102"]
    assert max(run["used"]["cuda:0"]) >= tab.server.allocated()
    chart.scroll_into_view_if_needed()
    tab.screenshot("panel-chart")


def test_a_models_name_is_never_taken_for_html(tab: Tab) -> None:
    tab.open_panel()
    name = "<img src=x onerror=window.hacked=1>"

    tab.server.load((name, "nf4", 16))

    expect(tab.row(name)).to_be_visible()

    assert tab.part("panel").locator("img").count() == 0
    assert tab.run("() => window.hacked") is None
