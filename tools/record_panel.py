"""Records the README's moving picture: a template runs in the real frontend over the simulated GPU, beside
the panel.

`.venv/bin/python -m tools.record_panel docs/panel.webp`. It needs Chromium and what `make test` sets up.
Frames stand as long as they stood when they were taken, at most two seconds.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

TEMPLATE = "Three models on one GPU"
SIZE = (1360, 850)
SHOWN = (1088, 680)  # pixels of the picture
MOST_BYTES = 1_500_000
LONGEST = 2000  # milliseconds that a frame may stand
END = 4000  # of the last one
# The graph right of the panel.
PLACE = """() => {
    app.canvas.ds.scale = 0.62
    app.canvas.ds.offset = [330, 160]
    app.canvas.setDirty(true, true)
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path, help="a .webp file")
    picture: Path = parser.parse_args().picture
    with tempfile.TemporaryDirectory() as folder:
        frames = record(Path(folder))
    save(frames, picture)
    print(f"{picture}: {len(frames)} frames, {picture.stat().st_size} bytes")


def record(folder: Path) -> list[tuple[float, Image.Image]]:
    """The frames of one run, each with the second at which it was taken."""
    # The tests' own server and tab; by name, as tools are no tests.
    servers, tabs, builders, conftest = (
        importlib.import_module(f"tests.browser.{name}")
        for name in ("servers", "tab", "builders", "conftest")
    )
    from playwright.sync_api import sync_playwright

    server = servers.Server(conftest.static_files("newest"), folder)
    server.start()
    try:
        with sync_playwright() as playwright:
            chromium = next(filter(None, map(shutil.which, conftest.NAMES)))
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
            page.route(lambda url: not url.startswith(server.url), lambda route: route.abort())
            tab = tabs.Tab(page, server, "newest").open()
            tab.run(builders.OPEN, TEMPLATE)
            tab.open_panel()
            tab.run(PLACE)
            page.wait_for_timeout(1500)
            frames = _run(tab, page, server)
            browser.close()
            return frames
    finally:
        server.stop()


def _run(tab: Any, page: Any, server: Any) -> list[tuple[float, Image.Image]]:
    frames = [(time.monotonic(), _take(page))]
    tab.run("() => { app.queuePrompt(0) }")
    ended = None
    while ended is None or time.monotonic() < ended + 2:
        frames.append((time.monotonic(), _take(page)))
        if ended is None and server.get("/history"):
            ended = time.monotonic()
    return frames


def _take(page: Any) -> Image.Image:
    taken = Image.open(io.BytesIO(page.screenshot()))
    return taken.convert("RGB").resize(SHOWN, Image.Resampling.LANCZOS)


def save(frames: list[tuple[float, Image.Image]], picture: Path) -> None:
    """Writes an animated WebP that goes on for ever.

    Raises:
        SystemExit: it is larger than a README's first picture should be.
    """
    moments = [moment for moment, _image in frames]
    stands = [int(1000 * (b - a)) for a, b in itertools.pairwise(moments)]
    durations = [*(min(stand, LONGEST) for stand in stands), END]
    images = [image for _moment, image in frames]
    images[0].save(
        picture,
        save_all=True,
        append_images=images[1:],
        duration=durations,
        loop=0,
        quality=60,
        method=6,
    )
    if picture.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{picture} has {picture.stat().st_size} bytes, more than {MOST_BYTES}.")


if __name__ == "__main__":
    main()
