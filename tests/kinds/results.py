"""What each check of each kind came to."""

from __future__ import annotations

import datetime
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


class Results:
    """By kind and check: "passed", "failed", or the reason for which it was left out."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._kinds: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, check: str, needs: str, report: Any) -> None:
        entry = self._kinds.setdefault(kind, {"needs": needs, "checks": {}})
        if needs:
            entry["needs"] = needs
        entry["checks"][check] = _reason(report) if report.skipped else report.outcome

    def write(self, path: Path) -> None:
        """Writes them as JSON, in the form of the other files in docs/results."""
        ended = [result for kind in self._kinds.values() for result in kind["checks"].values()]
        failures = [
            f"{name}: {check}"
            for name, kind in self._kinds.items()
            for check, result in kind["checks"].items()
            if result == "failed"
        ]
        whole = {
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "commit": _commit(),
            "minutes": round((time.monotonic() - self._began) / 60, 1),
            "torch": torch.__version__,
            "kinds": len(self._kinds),
            "passed": ended.count("passed"),
            "left_out": len(ended) - ended.count("passed") - len(failures),
            "failures": failures,
            "by_kind": self._kinds,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"every kind": whole}, indent=1) + "\n", encoding="utf-8")


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(text).removeprefix("Skipped: ")


def _commit() -> str:
    git = ["git", "describe", "--always", "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
