"""The result for people and programs: a table in the terminal, JSON, a page for each card."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checks import Check

_COLOURS = {"passed": "green", "failed": "bold red", "skipped": "yellow", "figure": ""}


def show(checks: Sequence[Check], seconds: float, simulated: bool, everything: bool) -> None:
    """Prints one row for each step, the figures, and each failure with what it concerns."""
    console = Console()
    where = "the simulated GPU: its figures say nothing of a real one" if simulated else "this GPU"
    table = Table(title=f"qmove on {where}", title_justify="left")
    for column in ("step", "passed", "failed", "skipped"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for step in dict.fromkeys(check.step for check in checks):
        counts = Counter(check.status for check in checks if check.step == step)
        failed = Text(str(counts["failed"]), "bold red" if counts["failed"] else "green")
        table.add_row(Text(step), str(counts["passed"]), failed, str(counts["skipped"]))
    console.print(table)
    for check in checks:
        if check.status == "failed" or everything:
            console.print(Text(_line(check), _COLOURS[check.status]))
    if not everything:
        for check in checks:
            if check.status == "skipped":
                console.print(Text(_line(check), _COLOURS[check.status]))
    console.print(f"{_summary(checks)}, {seconds:.0f} s")


def _line(check: Check) -> str:
    concerns = f" [{', '.join(check.topics)}]" if check.topics else ""
    detail = f": {check.detail}" if check.detail else ""
    return f"{check.status.upper():8} {check.step}: {check.name}{concerns}{detail}"


def as_json(checks: Sequence[Check], seconds: float, simulated: bool) -> str:
    """The result as JSON text."""
    result = {
        "date": _today(),
        "simulated": simulated,
        "seconds": round(seconds, 1),
        "summary": dict(Counter(check.status for check in checks)),
        "checks": [asdict(check) for check in checks],
    }
    return json.dumps(result, indent=1) + "\n"


def write_page(folder: Path, checks: Sequence[Check], seconds: float) -> Path:
    """Writes the report of a card, named after it, and returns where it lies."""
    card = next((c.detail for c in checks if c.name == "card"), "unknown card")
    path = folder / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".md")
    folder.mkdir(parents=True, exist_ok=True)
    link = [c for c in checks if c.name.startswith("link: ")]
    constants = ", ".join(f"{c.name.removeprefix('link: ')}={c.detail}" for c in link)
    lines = [
        f"# {card}",
        "",
        f"`make gpu-check` on {_today()}: {_summary(checks)}, {seconds:.0f} s.",
        "",
        f"For the simulator: `dataclasses.replace(simcuda.link.PCIE4, {constants})`",
        "",
        "| step | check | result | detail |",
        "|---|---|---|---|",
    ]
    for check in checks:
        status = "" if check.status == "figure" else check.status
        cells = (check.step, check.name, status, check.detail)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _summary(checks: Sequence[Check]) -> str:
    counts = Counter(check.status for check in checks)
    return ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "skipped"))


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
