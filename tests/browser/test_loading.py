"""The extension loads in each frontend that qmove supports, and its console stays silent."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from .tab import Tab

pytestmark = pytest.mark.every_frontend


def test_the_extension_loads_without_a_complaint(tab: Tab) -> None:
    tab.reload()

    expect(tab.sidebar_button).to_be_visible()
    tab.screenshot("loaded")
    assert tab.problems() == []
