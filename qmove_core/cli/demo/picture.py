"""The demo's picture: VRAM and RAM over time, stage by stage."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import MissingDependency


class Sample(NamedTuple):
    """Bytes in VRAM and in the arena, at a share (0 to 1) of a stage."""

    stage: int
    share: float
    vram: int
    ram: int


class Timeline:
    """Memory over time, sampled at the ends of each stage and at each copied storage."""

    def __init__(self, vram: Callable[[], int], ram: Callable[[], int]) -> None:
        self._vram, self._ram = vram, ram
        self._running: list[tuple[float, int, int]] = []
        self.names: list[str] = []
        self.seconds: list[float | None] = []
        self.samples: list[Sample] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One stage, in which something happens and takes its time."""
        self._running = []
        self.note()
        yield
        self.note()
        started, ended = self._running[0][0], self._running[-1][0]
        for moment, vram, ram in self._running:
            share = (moment - started) / (ended - started)
            self.samples.append(Sample(len(self.names), share, vram, ram))
        self.names.append(name)
        self.seconds.append(ended - started)

    def state(self, name: str) -> None:
        """A stage in which nothing happens."""
        for share in (0.0, 1.0):
            self.samples.append(Sample(len(self.names), share, self._vram(), self._ram()))
        self.names.append(name)
        self.seconds.append(None)

    def note(self, *_progress: object) -> None:
        """Takes a sample now."""
        self._running.append((time.perf_counter(), self._vram(), self._ram()))


def draw(
    path: Path, timelines: Mapping[str, Timeline], left_by_to: Mapping[str, int | None], where: str
) -> None:
    """Draws one panel for each model.

    Args:
        path: the file; its suffix decides the format.
        timelines: by precision.
        left_by_to: bytes that plain `.to("cpu")` left in VRAM, by precision.
        where: the device, for the title.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingDependency(
            "The picture needs matplotlib: pip install 'qmove[demo]'."
        ) from error

    figure = Figure(figsize=(10, 2.9 * len(timelines) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(timelines), 1, squeeze=False)[:, 0]
    shown: dict[str, Any] = {}  # the legend, with what all panels have
    for panel, (precision, line) in zip(panels, timelines.items(), strict=True):
        _draw_panel(panel, precision, line, left_by_to.get(precision))
        handles, labels = panel.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    corner: Any = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0)}
    panels[0].legend(shown.values(), shown.keys(), ncols=3, frameon=False, **corner)
    panels[-1].set_xlabel("stages drawn equally wide; below them their seconds", loc="right")
    title = f"all-MiniLM-L6-v2 parked and restored by qmove ({where})"
    figure.suptitle(title, x=0.01, ha="left", weight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_panel(panel: Any, precision: str, line: Timeline, left_by_to: int | None) -> None:
    x = [sample.stage + sample.share for sample in line.samples]
    ram = [sample.ram / 2**20 for sample in line.samples]
    vram = [sample.vram / 2**20 for sample in line.samples]
    panel.fill_between(x, ram, color="#d9822b", alpha=0.35, lw=0, label="RAM (qmove's arena)")
    panel.plot(x, vram, color="#1f5fa8", lw=2.2, label="VRAM")
    if left_by_to:
        away, mib, colour = line.names.index("parked"), left_by_to / 2**20, "#b3261e"
        label = "VRAM after plain .to('cpu')"
        panel.hlines(mib, away, away + 1, label=label, color=colour, ls="--", lw=2)
        panel.text(away + 0.5, mib, f"{mib:.1f} MiB", color=colour, ha="center", va="bottom")
    seconds = ["" if value is None else f"{value:.2f} s" for value in line.seconds]
    ticks = [f"{name}\n{duration}" for name, duration in zip(line.names, seconds, strict=True)]
    panel.set_xticks([number + 0.5 for number in range(len(ticks))], ticks, size=9)
    panel.tick_params(axis="x", length=0)
    panel.set_xlim(0, len(ticks))
    panel.set_ylim(bottom=0)
    for number in range(1, len(ticks)):
        panel.axvline(number, color="0.8", lw=0.8, zorder=0)
    panel.set_ylabel("MiB")
    panel.set_title(precision, loc="left", size=11)
    panel.spines[["top", "right"]].set_visible(False)
