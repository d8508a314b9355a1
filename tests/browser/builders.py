"""What the browser tests share: models to load, and how a test opens a workflow and reads a row of
the panel."""

from __future__ import annotations

from playwright.sync_api import expect

from .tab import Tab

ENCODER = ("TextEncoder", "nf4", 8)
TRANSFORMER = ("DiffusionTransformer", "int8", 24)
UPSCALER = ("Upscaler", "fp16", 34)
BIG = ("DiffusionTransformer", "fp16", 204)  # more than the core has under way at once
HALF = 100 << 20  # bytes of it that go over the link before it is held
OPEN = "async name => app.loadGraphData(await (await fetch(`/api/workflow_templates/qmove/${name}.json`)).json())"


def expect_state(tab: Tab, model: str, state: str) -> None:
    expect(tab.row(model)).to_have_attribute("data-state", state)
