"""One tab of the browser with the real frontend in it: how a test finds its way around, in any
version."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Error, Locator, Page, Response, expect

from .servers import Server

ARTEFACTS = Path(__file__).resolve().parent / "artefacts"
READY = "() => window.app?.vueAppReady && app.graph?._nodes?.length > 0"  # its default workflow is the last thing it loads
HAS_LIGHT_TEXT = r"""expected => {
    const probe = document.body.appendChild(document.createElement('i'))
    probe.style.color = 'var(--fg-color)'
    const light = parseInt(getComputedStyle(probe).color.match(/\d+/)[0]) > 128
    probe.remove()
    return light === expected
}"""
# What a fresh ComfyUI's console always says, and that is none of qmove's business.
ALWAYS_SAID = re.compile(
    r"/user\.css|/userdata/comfy\.templates\.json|/favicon\.ico|/templates/|api\.comfy\.org|graph accessed before init"
)
LOST = re.compile(
    r"ERR_CONNECTION_REFUSED|ERR_CONNECTION_RESET|ERR_EMPTY_RESPONSE|WebSocket connection|Failed to fetch"
)


class Tab:
    """A page, the server behind it, and what went wrong in it."""

    def __init__(self, page: Page, server: Server, version: str) -> None:
        self.page, self.server, self.version = page, server, version
        self.is_newest = version == "newest"
        self._problems: list[str] = []
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self._note(f"{error.message}\n{error.stack}"))
        page.on("response", self._note_response)

    # Loading --------------------------------------------------------------------------------------

    def open(self) -> Tab:
        self.page.goto(self.server.url)
        return self._wait_until_ready()

    def reload(self) -> Tab:
        self.page.reload()
        return self._wait_until_ready()

    def _wait_until_ready(self) -> Tab:
        try:
            self.page.wait_for_function(READY)
            expect(self.sidebar_button).to_be_visible()
        except (AssertionError, Error) as error:
            complaints = "\n".join(self.problems()) or "nothing"
            raise AssertionError(f"{error}\nThe page complained of: {complaints}") from error
        return self

    def run(self, script: str, argument: Any = None) -> Any:
        return self.page.evaluate(script, argument)

    def command(self, name: str) -> None:
        """Runs one of the frontend's commands, as its menu does."""
        self.run("name => { app.extensionManager.command.execute(name) }", name)

    def store(self, setting: str, value: Any) -> None:
        """Sets one of the frontend's own settings, as its dialog does."""
        self.run(
            "([name, value]) => app.extensionManager.setting.set(name, value)", [setting, value]
        )

    def value_of(self, setting: str) -> Any:
        return self.run("name => app.extensionManager.setting.get(name)", setting)

    def use_theme(self, name: str) -> None:
        self.store("Comfy.ColorPalette", name)
        self.page.wait_for_function(HAS_LIGHT_TEXT, arg=name == "dark")

    # Finding --------------------------------------------------------------------------------------

    def part(self, name: str) -> Locator:
        """A part of the panel: the `data-testid` without "qmove-"."""
        return self.page.get_by_test_id(f"qmove-{name}")

    @property
    def sidebar_button(self) -> Locator:
        return self.page.locator(".qmove-tab-button, [data-testid=qmove-tab-button]")

    @property
    def toasts(self) -> Locator:
        return self.page.locator(".p-toast-message, [data-testid=toast]")

    def open_panel(self) -> Locator:
        if not self.part("panel").is_visible():
            self.sidebar_button.click()
        expect(self.part("panel")).to_be_visible()
        return self.part("panel")

    def row(self, model: str) -> Locator:
        return self.part("model-row").filter(has_text=model)

    def open_settings(self) -> Locator:
        """The settings dialog, at qmove's page."""
        self.command("Comfy.ShowSettingsDialog")
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text("qmove", exact=True).first.click()
        expect(self.setting("qmove.autoPark")).to_be_attached()
        return dialog

    def setting(self, name: str) -> Locator:
        """The control of a setting, by the label that it is announced with."""
        return self.page.locator(f'[aria-labelledby="{name}-label"]')

    # Looking --------------------------------------------------------------------------------------

    def screenshot(self, name: str) -> Path:
        """Takes a picture of what the tab shows, once nothing moves."""
        ARTEFACTS.mkdir(exist_ok=True)
        path = ARTEFACTS / f"{self.version}-{name}.png"
        self.page.screenshot(path=path, animations="disabled")
        return path

    # What went wrong ------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """What the console complained of since the last time it was asked."""
        problems, self._problems = self._problems, []
        return problems

    def expect_problems(self, pattern: re.Pattern[str]) -> None:
        """Takes away the complaints that this test has brought about itself."""
        self._problems = [problem for problem in self._problems if not pattern.search(problem)]

    def _note(self, problem: str) -> None:
        if not ALWAYS_SAID.search(problem):
            self._problems.append(problem)

    def _note_message(self, message: ConsoleMessage) -> None:
        if (
            message.type == "error" and "Failed to load resource" not in message.text
        ):  # those are noted as responses
            self._note(f"{message.text} ({message.location.get('url', '')})")

    def _note_response(self, response: Response) -> None:
        if response.status >= 400:
            self._note(f"{response.status} {response.request.method} {response.url}")
