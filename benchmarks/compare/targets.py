"""What was to be reached, and what was: issue by issue a limit, the figure of this run, and whether
it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any


@dataclass(frozen=True)
class Target:
    """A limit and what this run reached: `where` is a workload on a link, or says what was
    compared.

    `figure` is None where nothing was measured; `note` then says why.
    """

    what: str
    limit: float
    figure: float | None
    unit: str = "x"
    where: str = ""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        return None if self.figure is None else self.figure <= self.limit


def in_the_link_model(results: dict[str, Any]) -> list[Target]:
    """Those about copies, for each workload on each link."""
    found = []
    for workload in results["workloads"]:
        for link in results["links"]:
            where = f"{workload['name']}, {LINK_NAMES[link]}"
            found += [*_moves(workload, link, where), *_swaps(workload, link, where)]
    return found


def on_the_wall(results: dict[str, Any]) -> list[Target]:
    """Those about this machine's own time."""
    return [*_walls(results), *_growth(results)]


LINK_NAMES = {
    "pcie4": "PCIe 4",
    "pcie5": "PCIe 5",
    "pcie4, slow pageable": "PCIe 4, slow pageable",
    None: "this link",
}
# Of the first two, pageable copies are the fastest that others measured; of the last the slowest.
SWAP_LINKS = ("pcie4", "pcie5", "pcie4, slow pageable")
MOVES = ("first park", "restore", "second park", "second restore")


def _moves(workload: dict[str, Any], link: str | None, where: str) -> Iterator[Target]:
    moves = workload["moves"].get(link or "wall")
    if moves is None:
        return
    if "error" in moves:
        yield Target("qmove's moves", 0, None, where=where, note=moves["error"])
        return
    bare, seconds = moves["seconds_for"], {name: _seconds(moves[name]) for name in MOVES}
    yield Target("restore / link", 1.05, seconds["restore"] / bare["in"], where=where)
    yield Target("second restore / link", 1.05, seconds["second restore"] / bare["in"], where=where)
    slower = max(bare["out"], bare["pinning"])
    yield Target(
        "first park / max(link, pinning)", 1.3, seconds["first park"] / slower, where=where
    )
    yield Target("second park, bytes", 0, moves["second park"]["copied_bytes"], "bytes", where)
    yield Target(
        "second park / first", 0.01, seconds["second park"] / seconds["first park"], where=where
    )
    for stream in moves.get("streaming", []):
        best = max(stream["transfer"], stream["compute"])
        what = f"streaming, kernels {stream['share']:g} x / max(transfer, compute)"
        yield Target(what, 1.1, stream["both"] / best, where=where)
    for forward in moves.get("rolling", []):
        best = max(forward["transfer"], forward["compute"])
        what = f"in a third of its VRAM, kernels {forward['share']:g} x / max(transfer, compute)"
        yield Target(what, 1.1, forward["both"] / best, where=where)


def _swaps(workload: dict[str, Any], link: str | None, where: str) -> Iterator[Target]:
    key = f"swaps {link}" if link else "swaps"
    ours, plain = (
        workload["contenders"].get(name, {}).get(key) for name in ("qmove", "plain .to()")
    )
    if ours is None or plain is None:
        return
    moved = [reading["h2d_bytes"] + reading["d2h_bytes"] for reading in (ours, plain)]
    yield Target("ten swaps, bytes / .to()", 0.5, moved[0] / moved[1], where=where)
    yield Target("ten swaps, time / .to()", 0.3, _seconds(ours) / _seconds(plain), where=where)


def _walls(results: dict[str, Any]) -> Iterator[Target]:
    copy = results["beside a copy"]
    for when, memory in (("fresh", "new memory"), ("again", "memory used before, no mirror")):
        for step, way in (("park", "out"), ("restore", "back")):
            figure = (
                copy[f"qmove {when}"][way] / copy[f"copy {when}"][way]
                if f"qmove {when}" in copy
                else None
            )
            yield Target(
                f"{step} / a plain copy", 1.15, figure, where=memory, note=copy.get("error", "")
            )
    sizes = {point["tensors"]: point for point in results["by tensors"] if "error" not in point}
    many, some = sizes.get(10_000), sizes.get(1_000)
    yield Target(
        "inventory of 10,000 tensors", 100, many["inventory"]["wall"] * 1e3 if many else None, "ms"
    )
    rest = (some["second park"]["wall"] - some["digest"]["wall"]) * 1e3 if some else None
    yield Target("second park of 1,000 tensors, besides the digest", 30, rest, "ms")


def _growth(results: dict[str, Any]) -> Iterator[Target]:
    """How the cost grows over the last factor of ten or more: the exponent, 1 is linear."""
    for key, axis, name in (("by tensors", "tensors", "tensors"), ("by bytes", "nbytes", "bytes")):
        points = [point for point in results[key] if "error" not in point]
        if len(points) < 2:
            continue
        last = points[-1]
        first = max(
            (p for p in points if p[axis] * 9 <= last[axis]),
            key=lambda p: p[axis],
            default=points[0],
        )
        for step in ("inventory", "first park", "second park", "restore"):
            exponent = log(last[step]["wall"] / first[step]["wall"]) / log(last[axis] / first[axis])
            yield Target(
                f"{step} ~ {name}^x",
                1.15,
                exponent,
                "",
                f"{first[axis]:,} to {last[axis]:,} {name}",
            )


def _seconds(reading: dict[str, Any]) -> float:
    return float(reading["wall"] if reading["link"] is None else reading["link"])
