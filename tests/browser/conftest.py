"""One server, one browser and one tab for each version of the frontend; each test finds them as a
first-time user would."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from playwright.sync_api import Browser, BrowserContext, Playwright, expect, sync_playwright

from tests.builders.device import SIMULATED

from .servers import Server
from .tab import ARTEFACTS, Tab

FRONTENDS = ("newest", "1.49.6", "1.27.10")  # as tools/setup_env.py installs them
SECONDS = 20.0  # how long anything may take to appear; only what never comes waits so long
NAMES = ("chromium", "chromium-browser", "google-chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-screenshots",
        action="store_true",
        help="write the pictures that the README shows to docs/",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "every_frontend: runs in each version of the frontend, not only in the newest"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "frontend" in metafunc.fixturenames:
        everywhere = metafunc.definition.get_closest_marker("every_frontend")
        versions = (everywhere.args or FRONTENDS) if everywhere else FRONTENDS[:1]
        metafunc.parametrize("frontend", versions, indirect=True, scope="package")


@pytest.fixture(scope="package")
def chromium() -> str:
    """Where Chromium is."""
    if not SIMULATED:
        pytest.skip(
            "needs the simulated GPU, whose copies it stops half way; this machine has a real one"
        )
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or _lacking(
        "Chromium: run `make test` as root on Debian or Ubuntu, or name one in CHROMIUM"
    )


def _lacking(what: str) -> NoReturn:
    """Skips what cannot be run here, but never in CI, whose set-up installs everything."""
    if os.environ.get("CI"):
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture(scope="package")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture(scope="package")
def browser(playwright: Playwright, chromium: str) -> Iterator[Browser]:
    # Root, as in a container, gets no sandbox; the pages are our own.
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    yield browser
    browser.close()


@pytest.fixture(scope="package")
def frontend(request: pytest.FixtureRequest, chromium: str) -> str:
    return request.param


@pytest.fixture(scope="package")
def server(frontend: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(static_files(frontend), tmp_path_factory.mktemp(f"comfyui-{frontend}"))
    server.start()
    yield server
    server.stop()
    ARTEFACTS.mkdir(exist_ok=True)
    shutil.copyfile(server.log, ARTEFACTS / f"{frontend}-server.log")


def static_files(version: str) -> Path:
    """The files of a frontend package, beside the environment that this Python belongs to."""
    folder = (
        Path(sys.prefix) / f"comfyui-frontend-{version}" / "comfyui_frontend_package" / "static"
    )
    return (
        folder
        if folder.is_dir()
        else _lacking(f"ComfyUI's frontend {version}: run `make test`, which sets it up")
    )


@pytest.fixture(scope="package")
def context(browser: Browser, server: Server) -> Iterator[BrowserContext]:
    """What the tabs share: the cache. Nothing outside of this machine is reached."""
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, locale="en-US", reduced_motion="reduce"
    )
    context.set_default_timeout(SECONDS * 1000)
    context.route(lambda url: not url.startswith(server.url), lambda route: route.abort())
    yield context
    context.close()


_tabs: dict[BrowserContext, Tab] = {}


@pytest.fixture
def tab(
    request: pytest.FixtureRequest, context: BrowserContext, server: Server, frontend: str
) -> Iterator[Tab]:
    """The tab of this version, tidied up: dialogs and panel closed, default settings, no model
    loaded.

    It stays open from test to test, as people leave it open; after a failure the next test gets a
    new one.
    """
    kept = _tabs.pop(context, None)
    tab = kept or Tab(context.new_page(), server, frontend).open()
    _tidy(tab)
    tab.problems()
    yield tab
    report: Any = request.node.stash.get(REPORT, None)
    if report is None or report.failed:
        tab.screenshot(f"failed-{request.node.originalname}")
        tab.page.close()
        return
    problems = tab.problems()
    if problems:
        tab.page.close()
    else:
        _tabs[context] = tab
    assert not problems, "the page complained:\n" + "\n".join(problems)


@pytest.fixture
def second_tab(tab: Tab, context: BrowserContext) -> Iterator[Tab]:
    other = Tab(context.new_page(), tab.server, tab.version).open()
    yield other
    other.page.close()


DEFAULTS = {
    "qmove.autoPark": True,
    "qmove.autoParkWhen": "needed",
    "qmove.keepLoaded": True,
    "qmove.keepLoadedLimit": 0,
    "qmove.keepLoadedOwn": False,
    "qmove.keepMirrors": True,
    "qmove.ramLimit": 0,
    "qmove.vramToKeepFree": 0,
    "qmove.idleMinutes": 0,
    "qmove.runAgain": True,
    "qmove.verify": False,
    "qmove.notifications": True,
}


def _tidy(tab: Tab) -> None:
    tab.server.start_if_ended()
    tab.server.let_copies_go()
    tab.page.set_viewport_size({"width": 1280, "height": 800})
    for dialog in tab.page.get_by_role("dialog").all():
        tab.page.keyboard.press("Escape")
        expect(dialog).not_to_be_visible()
    tab.run(
        "values => Promise.all(Object.entries(values).map(([k, v]) => app.extensionManager.setting.set(k, v)))",
        DEFAULTS,
    )
    tab.server.forget_models()
    if tab.value_of("Comfy.RightSidePanel.IsOpen"):
        tab.store("Comfy.RightSidePanel.IsOpen", False)
    if tab.part("panel").is_visible():
        tab.sidebar_button.click()
    tab.run("() => app.extensionManager.toast.removeAll?.()")
    expect(tab.toasts).to_have_count(0)


REPORT = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if call.when == "call":
        item.stash[REPORT] = report
    return report


@pytest.fixture
def picture_for_readme(request: pytest.FixtureRequest) -> Any:
    """Copies a screenshot to docs/, if the run was told to."""

    def keep(picture: Path, name: str) -> None:
        if request.config.getoption("--update-screenshots", default=False):
            shutil.copyfile(picture, Path(__file__).resolve().parents[2] / "docs" / name)

    return keep
