"""Writes docs/kinds.md, kinds x checks, from what `make test-kinds` left in docs/results/kinds.json.

make test-kinds          tries all kinds, and writes both files
python -m tools.kinds    writes the document alone
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "kinds.json"
DOCUMENT = ROOT / "docs" / "kinds.md"

# What each check asks, in the order of the columns; tests/kinds/checks.py has them.
CHECKS = {
    "parked": "a park leaves 0 bytes on the device; what cannot be parked rightly stays, and is named",
    "restored": "the same bytes in the same tensor objects, twice",
    "attributes": "every attribute of every module, tensor and object between them",
    "aliases": "what shares a storage shares it again",
    "outputs": "computes the same after a round trip",
    "wakes": "used while it is parked: the same output, and no trace of it",
    "streams": "used while it arrives",
    "rolls": "runs in less VRAM than it takes, or is refused by name",
    "on disk": "parked on the disk",
    "move to the CPU": "computes there and comes back exact, or is refused by name",
    "casts": "a cast of quantized weights is refused, also while it is parked",
    "materialized": "what accelerate offloads of it is read back, or refused by name; and the same dispatch again",
    "adapter": "with an adapter around it",
    "added while parked": "an adapter that is put on while it is parked",
    "copied while parked": "a deep copy of a parked one",
    "faults": "a copy or allocation that fails, at the first, a middle and the last one",
}
PASSED, FAILED = "✓", "**failed**"


def main() -> None:
    """Writes the document."""
    [whole] = json.loads(RESULTS.read_text(encoding="utf-8")).values()
    DOCUMENT.write_text(render(whole), encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


def render(whole: Mapping[str, Any]) -> str:
    """The document, of the results of one run.

    Args:
        whole: as in docs/results/kinds.json: date, commit, counts, and `by_kind` the result of each
            check: "passed", "failed", or why it was left out.
    """
    kinds: Mapping[str, Any] = whole["by_kind"]
    reasons: dict[str, int] = {}
    rows, absent = [], []
    for name, kind in kinds.items():
        results = {check: kind["checks"].get(check, "") for check in CHECKS}
        tried = [check for check, result in results.items() if result in ("passed", "failed")]
        if not tried:
            absent.append(f"| {name} | {_plain(next(iter(results.values())))} |")
            continue
        cells = [_cell(result, reasons) for result in results.values()]
        rows.append(f"| {name} | {kind['needs']} | {' | '.join(cells)} |")
    lines = [
        "# Kinds of models, and what holds for each",
        "",
        "Written by `python -m tools.kinds` from what `make test-kinds` left in [docs/results/kinds.json](results/kinds.json).",
        f"Run on {whole['date']} at commit {whole['commit']}, torch {whole['torch']}, on the simulated GPU: {len(kinds)} kinds,",
        f"{whole['passed']:,} checks passed, {len(whole['failures'])} failed, {whole['left_out']:,} were left out. `make test` tries a sample.",
        "",
        f"{PASSED} holds. A number: left out, for the reason below. An empty field: not tried.",
        "",
        f"| kind | ran with | {' | '.join(CHECKS)} |",
        f"|---|---|{'---|' * len(CHECKS)}",
        *rows,
        "",
        "## What is checked",
        "",
        "| check | what must hold |",
        "|---|---|",
        *(f"| {check} | {text} |" for check, text in CHECKS.items()),
        "",
        "## Why some were left out",
        "",
        *(f"{number}. {_plain(reason)}" for reason, number in reasons.items()),
    ]
    if absent:
        lines += [
            "",
            "## Kinds that could not be built",
            "",
            "| kind | why |",
            "|---|---|",
            *absent,
        ]
    return "\n".join(lines) + "\n"


def _cell(result: str, reasons: dict[str, int]) -> str:
    if result in ("passed", ""):
        return PASSED if result else ""
    if result == "failed":
        return FAILED
    return str(reasons.setdefault(result, len(reasons) + 1))


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
