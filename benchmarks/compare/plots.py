"""The plots of the page, readable on light and on dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .rows import readable

GREY, OURS, PEERS = "#7d8590", "#2f81f7", "#9aa4af"
COLOURS = {
    "inventory": "#8957e5",
    "first park": "#d9822b",
    "second park": "#2da44e",
    "restore": "#2f81f7",
}
STYLE = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "axes.titlecolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "qmove",
}  # fmt: skip


def swaps(results: dict[str, Any], path: Path) -> None:
    """Seconds of ten swaps on the first link: a panel for each workload, a bar for each contender."""
    link = results["links"][0]
    key, clock = (f"swaps {link}", "link") if link else ("swaps", "wall")
    with rc_context(STYLE):
        rows = (len(results["workloads"]) + 1) // 2
        figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
        FigureCanvasAgg(figure)
        for place, (axes, workload) in enumerate(
            zip(figure.subplots(rows, 2).flat, results["workloads"], strict=False)
        ):
            _bars(axes, workload, key, clock, named=place % 2 == 0)
        where = (
            "PCIe 4, in the link model of a simulated GPU" if link else results["machine"]["device"]
        )
        figure.suptitle(f"Seconds of ten swaps of two models ({where})", color=GREY)
        _save(figure, path)


def _bars(axes: Any, workload: dict[str, Any], key: str, clock: str, named: bool) -> None:
    entries = list(workload["contenders"].items())[::-1]
    seconds = [figures[key][clock] if key in figures else 0.0 for _name, figures in entries]
    axes.barh(
        range(len(entries)),
        seconds,
        color=[OURS if name.startswith("qmove") else PEERS for name, _ in entries],
    )
    axes.set_yticks(range(len(entries)), [name if named else "" for name, _figures in entries])
    for place, ((_name, figures), value) in enumerate(zip(entries, seconds, strict=True)):
        text = f" {value:.3g} s" if key in figures else " fails"
        if figures.get("left"):
            text += f", {readable(figures['left'])} stay in VRAM"
        axes.text(value, place, text, va="center", color=GREY, fontsize=9)
    axes.set_xlim(0, (max(seconds) or 1) * 1.7)  # room for what is written beside the bars
    axes.set_title(
        f"{workload['name']}, {readable(workload['nbytes'])} each", fontsize=10, loc="left"
    )


def growth(results: dict[str, Any], path: Path) -> None:
    """Wall seconds of each step by the number of tensors and by bytes, both axes logarithmic:
    linear is a slope of one."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.8), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        _lines(left, results["by tensors"], "tensors", 1, "tensors, of 132 bytes on average")
        _lines(right, results["by bytes"], "nbytes", 1e6, "MB, in 64 tensors")
        figure.suptitle("Wall seconds as a model grows (dotted: linear)", color=GREY)
        _save(figure, path)


def _lines(axes: Any, points: list[dict[str, Any]], axis: str, unit: float, label: str) -> None:
    points = [point for point in points if "error" not in point]
    at = [point[axis] / unit for point in points]
    for step, colour in COLOURS.items():
        axes.plot(
            at,
            [point[step]["wall"] for point in points],
            "o-",
            color=colour,
            label=step,
            markersize=4,
        )
    if points:
        start = points[-1]["first park"]["wall"]
        axes.plot(at, [start * x / at[-1] for x in at], ":", color=GREY, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds")
    axes.grid(True, color=GREY, alpha=0.2)
    axes.legend(frameon=False, fontsize=9, loc="best")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(
        path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None
    )
