"""How much a run tries, by which seed, and what it writes down.

| variable | what it sets |
|---|---|
| `QMOVE_FAULT_SEED` | the seed; else it comes from the commit |
| `QMOVE_FAULT_MINUTES` | `make test-faults`: how long all of `tests/faults` may take; else a sample |
| `QMOVE_FAULT_RESULTS` | the file that the results go to |
| `QMOVE_FAULT_POINT` | one point, as a failure names it |
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
MINUTES = float(os.environ.get("QMOVE_FAULT_MINUTES", 0))
POINT = os.environ.get("QMOVE_FAULT_POINT", "")
# Of the minutes, what each suite may take; the rest is what has an end of its own.
SHARES = {"every point": 0.7, "histories": 0.15, "threads": 0.05}
PACKAGES = ("torch", "bitsandbytes", "torchao", "accelerate", "safetensors", "hypothesis")


def commit() -> str:
    """The commit under test, "unknown" outside of a repository; "+" for changes beside it."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _seed() -> int:
    chosen = os.environ.get("QMOVE_FAULT_SEED")
    if chosen:
        return int(chosen)
    digits = commit().rstrip("+")
    return int(digits[:8], 16) if digits != "unknown" else 0


SEED = _seed()
_started = time.monotonic()
_sections: dict[str, dict[str, Any]] = {}


def seconds_for(suite: str) -> float | None:
    """How long a suite may take; None for a sample, which has a size and no time."""
    return MINUTES * 60 * SHARES[suite] if MINUTES else None


def note(suite: str, **figures: Any) -> None:
    """Writes down what a suite has tried; numbers of the same name add up, lists go on."""
    section = _sections.setdefault(suite, {})
    for name, value in figures.items():
        section[name] = _sum(section.get(name), value)


def _sum(before: Any, value: Any) -> Any:
    if before is None:
        return value
    if isinstance(value, dict):
        return {
            k: _sum(before.get(k), value[k]) if k in value else before[k]
            for k in {**before, **value}
        }
    if isinstance(value, bool):
        return before and value
    return before + value if isinstance(value, (int, list)) else value


def noted() -> dict[str, dict[str, Any]]:
    """What the suites of this run have written down."""
    return _sections


def write(path: Path) -> None:
    """Puts the results into a file. What it says of suites that did not run now stays."""
    suites = json.loads(path.read_text()) if path.exists() else {}
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "seed": SEED,
        "minutes": round((time.monotonic() - _started) / 60, 1),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "simulated": True,
    }
    suites |= {name: {**about, **figures} for name, figures in _sections.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(suites, indent=1, sort_keys=True) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
