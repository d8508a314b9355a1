"""The cells of the tables, for the terminal and for the page alike."""

from __future__ import annotations

from typing import Any

from .targets import LINK_NAMES, Target, in_the_link_model, on_the_wall


def headings(results: dict[str, Any]) -> list[str]:
    seconds = [f"ten swaps, s, {LINK_NAMES[link]}" for link in _swap_links(results)]
    return [
        "",
        *(
            ["first two, s, PCIe 4", *seconds, "ten swaps, s, wall here"]
            if seconds
            else ["first two, s", "ten swaps, s"]
        ),
        *("GB in (copies)", "GB out (copies)", "GB for one more forward"),
        *("MB left in VRAM", "peak VRAM, GB", "peak RAM, GB", "equal", "keeps a change"),
    ]


def _swap_links(results: dict[str, Any]) -> list[str]:
    """Those that all contenders swapped on; none on a real GPU. Older results do not name them."""
    return [link for link in results.get("swap links", results["links"]) if link]


def row(results: dict[str, Any], name: str, figures: dict[str, Any]) -> list[str]:
    """One contender; what it did not reach is empty."""
    links = _swap_links(results)
    ten = figures.get(f"swaps {links[0]}" if links else "swaps")
    first = figures.get("first")
    cells = [name]
    cells.append(_seconds(first, "link" if links else "wall"))
    cells += [_ten(figures.get(f"swaps {link}")) for link in links]
    cells.append(_seconds(ten, "wall"))
    cells += [_moved(ten, "h2d"), _moved(ten, "d2h")]
    cells.append(_bytes(figures.get("again", {}).get("h2d_bytes"), 1e9))
    cells.append(_bytes(figures.get("left"), 1e6))
    cells += [_bytes(figures.get(key) if ten else None, 1e9) for key in ("peak_vram", "peak_ram")]
    equal = figures.get("same_output"), figures.get("same_bytes")
    cells.append("" if None in equal else "yes" if all(equal) else "**no**")
    cells.append({None: "", True: "yes", False: "**no**"}[figures.get("keeps_changes")])
    return cells


def remarks(workload: dict[str, Any]) -> list[str]:
    """What went wrong, contender by contender."""
    found = []
    for name, figures in workload["contenders"].items():
        if "error" in figures:
            found.append(f"{name}, {figures.get('stage', 'at once')}: {figures['error']}")
        if figures.get("left"):
            found.append(
                f"{name} leaves {readable(figures['left'])} in VRAM when both models are put away"
            )
        if figures.get("wrong"):
            found.append(f"{name}: other bytes than in the file in {', '.join(figures['wrong'])}")
        if figures.get("same_output") is False:
            found.append(f"{name}: another output than before")
    return found


def reached_by_link(results: dict[str, Any]) -> list[list[str]]:
    """Headings, limits, and a line for each workload on each link; bold is what was not reached."""
    targets = in_the_link_model(results)
    whats = list(dict.fromkeys(target.what for target in targets))
    limits = {target.what: f"{target.limit:g} {target.unit}" for target in targets}
    lines = [["", *whats], ["at most", *(limits[what] for what in whats)]]
    for where in dict.fromkeys(target.where for target in targets):
        there = {target.what: target for target in targets if target.where == where}
        lines.append([where, *(_figure(there[what]) if what in there else "" for what in whats)])
    return lines


def reached_on_the_wall(results: dict[str, Any]) -> list[list[str]]:
    """Headings, and a line for each target; bold is what was not reached."""
    lines = [["", "at most", "figure", "where"]]
    for target in on_the_wall(results):
        lines.append(
            [target.what, f"{target.limit:g} {target.unit}", _figure(target), target.where]
        )
    return lines


def _figure(target: Target) -> str:
    if target.figure is None:
        return f"not measured: {target.note}" if target.note else "not measured"
    text = f"{target.figure:,.3g}" if target.figure < 1000 else f"{target.figure:,.0f}"
    return text if target.reached else f"**{text}**"


def little_room(results: dict[str, Any]) -> list[list[str]]:
    """Headings, and a line for each case and way of taking turns."""
    seconds = "ten swaps, s, PCIe 4" if results["simulated"] else "ten swaps, s"
    lines = [
        ["", "", seconds, "GB in (copies)", "GB out (copies)", "peak VRAM, GB", "peak RAM, GB"]
    ]
    for turns in results.get("little room", []):
        if "error" in turns:
            reason = str(turns["error"]).split(". ")[0]
            lines.append([turns["case"], turns["way"], reason, "", "", "", ""])
            continue
        cells = [_seconds(turns, "link" if results["simulated"] else "wall")]
        cells += [_moved(turns, "h2d"), _moved(turns, "d2h")]
        cells += [_bytes(turns[key], 1e9) for key in ("peak_vram", "peak_ram")]
        lines.append([turns["case"], turns["way"], *cells])
    return lines


def forwards(results: dict[str, Any]) -> list[list[str]]:
    """Headings, and a line for each precision: a forward after a restore, over one before."""
    lines = [["", "after / before", "half of the rounds", "a forward, ms", "operators"]]
    for measured in results.get("forwards", []):
        name = f"{measured['precision']}, {measured['layers']} layers"
        if "error" in measured:
            lines.append([name, str(measured["error"]), "", "", ""])
            continue
        before, after = measured["operators"]
        ratio = f"{measured['ratio']:.3f}"
        lines.append(
            [
                name,
                ratio if abs(measured["ratio"] - 1) <= FORWARD_TOLERANCE else f"**{ratio}**",
                f"{measured['low']:.3f} to {measured['high']:.3f}",
                f"{measured['forward'] * 1e3:.3g}",
                f"{before:,}" if before == after else f"**{before:,}, then {after:,}**",
            ]
        )
    return lines


FORWARD_TOLERANCE = 0.02


def readable(nbytes: float) -> str:
    """In GB, MB or kB."""
    unit, name = next(
        (pair for pair in ((1e9, "GB"), (1e6, "MB")) if nbytes >= pair[0]), (1e3, "kB")
    )
    return f"{nbytes / unit:.3g} {name}"


def _ten(reading: dict[str, Any] | None) -> str:
    return "" if reading is None else f"{reading['link'] * 10 / reading['number']:.3g}"


def _seconds(reading: dict[str, Any] | None, clock: str) -> str:
    return "" if reading is None else f"{reading[clock]:.3g}"


def _moved(reading: dict[str, Any] | None, way: str) -> str:
    return (
        ""
        if reading is None
        else f"{reading[f'{way}_bytes'] / 1e9:.3g} ({reading[f'{way}_copies']:,})"
    )


def _bytes(count: int | None, unit: float) -> str:
    return (
        ""
        if count is None
        else f"{count / unit:,.3g}"
        if count < 1e3 * unit
        else f"{count / unit:,.0f}"
    )
