"""The results on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from . import rows


def show(console: Console, results: dict[str, Any]) -> None:
    """A table for each workload, what went wrong, and the targets."""
    for workload in results["workloads"]:
        table = Table(
            title=f"{workload['name']}: two models of {rows.readable(workload['nbytes'])}",
            title_justify="left",
        )
        for heading in rows.headings(results):
            table.add_column(heading, justify="right" if heading else "left")
        for name, figures in workload["contenders"].items():
            table.add_row(*(cell.replace("**", "") for cell in rows.row(results, name, figures)))
        console.print(table)
        for remark in rows.remarks(workload):
            console.print(f"  {remark}", markup=False, highlight=False)
    for workload in results["workloads"]:
        for name, figures in workload["contenders"].items():
            if name.startswith("qmove") and "traceback" in figures:
                console.print(
                    f"{workload['name']}: {name}\n{figures['traceback']}",
                    markup=False,
                    highlight=False,
                )
    for title, lines in (
        (
            "to be reached in the link model" if results["simulated"] else "to be reached",
            rows.reached_by_link(results),
        ),
        ("swaps in little room", rows.little_room(results)),
        ("a forward after a restore, over one before the park", rows.forwards(results)),
        ("to be reached on this machine, wall", rows.reached_on_the_wall(results)),
    ):
        table = Table(*lines[0], title=f"{title} (red: not reached)", title_justify="left")
        for line in lines[1:]:
            table.add_row(
                *(f"[red]{cell.strip('*')}[/]" if cell.startswith("**") else cell for cell in line)
            )
        console.print(table)
    if results["simulated"]:
        console.print(
            "The GPU is simulated: bytes, copies and equality are exact, seconds are those of its link model."
        )
