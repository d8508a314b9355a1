"""Runs a set of tests with each release that people run, and writes docs/releases.md.

    make matrix                            all cells
    make matrix MATRIX_ARGS="--only torch"  one axis; the others keep what docs/results/matrix.json says

A cell gets an environment: of its own where PyTorch or Python is another one, else the releases alone, in a folder that goes
before the ordinary environment. Builds of PyTorch for CUDA cannot be simulated: there tests/releases runs, which needs no device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "matrix.json"
DOCUMENT = ROOT / "docs" / "releases.md"
BASE = ("numpy", "psutil", "rich", "safetensors", "typer", "pytest", "hypothesis")
BESIDE_TORCH = ("accelerate", "transformers", "bitsandbytes", "diffusers", "optimum-quanto")
DISPATCHED = (
    "tests/materialize/test_materialize.py",
    "tests/integrations/test_accelerate_dispatch.py",
    "tests/methods/test_redispatch.py",
    "tests/integrations/test_parking_dispatched.py",
    "tests/integrations/test_weights_map.py",
)
STORIES = (
    "becomes_an_ordinary_one or very_same_dispatch or parked_dispatch_wakes or old_map_again "
    "or damaged or truncated"
)
TRANSFORMERS = (
    "tests/integrations/test_description.py",
    "tests/methods/test_enable_to.py",
    "tests/integrations/test_dispatch_quantized.py",
)
NO_KERNELS = (
    "its CPU build has no quantization kernels, and those for CUDA do not run on a simulated GPU: layers laid out by hand are "
    "moved and compared, and compute nothing"
)
NO_DEVICE = "its build is for CUDA, which the simulator cannot take: what needs no device was tried"


@dataclass(frozen=True)
class Cell:
    """One release on one axis.

    Attributes:
        axis, release: as in the table.
        packages: what pip installs, pinned.
        python: another Python, by its version; empty for the one that runs this.
        alone: an environment of its own. Otherwise the packages go, without their requirements,
            before those of the environment that runs this.
        tests, keyword: for pytest.
        every_kind: try all kinds of tests/kinds and not only the sample.
        note: what the cell does not show.
    """

    axis: str
    release: str
    packages: tuple[str, ...] = ()
    python: str = ""
    alone: bool = False
    tests: tuple[str, ...] = ("tests/releases",)
    keyword: str = ""
    every_kind: bool = False
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.axis}-{self.release}".replace(" ", "-")


def _torch(release: str, *beside: str) -> Cell:
    return Cell(
        "torch",
        release,
        (f"torch=={release}", *BASE, *BESIDE_TORCH, *beside),
        alone=True,
        note=NO_DEVICE,
    )


def _python(release: str) -> Cell:
    packages = ("torch", *BASE, *BESIDE_TORCH, "torchao")
    return Cell("Python", release, packages, python=release, alone=True, note=NO_DEVICE)


def _beside(axis: str, release: str, tests: Sequence[str], *packages: str, **options: Any) -> Cell:
    pinned = () if release == "newest" else (f"{axis}=={release}", *packages)
    return Cell(axis, release, pinned, tests=tuple(tests), **options)


KINDS = ("tests/kinds",)
CELLS = (
    _torch("2.6.0", "torchao==0.9.0"),
    _torch("2.8.0", "torchao==0.12.0"),
    _torch("2.10.0"),
    Cell("torch", "newest CPU build", tests=("tests/releases", *KINDS)),
    *(
        _beside(
            "bitsandbytes",
            release,
            KINDS,
            keyword="bitsandbytes and hand",
            every_kind=True,
            note=NO_KERNELS,
        )
        for release in ("0.44.1", "0.45.5")
    ),
    _beside("bitsandbytes", "newest", KINDS, keyword="bitsandbytes", every_kind=True),
    _beside(
        "transformers",
        "4.46.3",
        TRANSFORMERS,
        "tokenizers<0.21",
        "huggingface_hub<1",
        "diffusers==0.32.2",
    ),
    _beside(
        "transformers",
        "4.56.2",
        TRANSFORMERS,
        *("tokenizers>=0.22,<=0.23", "huggingface_hub<1"),
        keyword="not pipeline and not wrapper",
        note="without diffusers: none fits both this release and the newest torchao",
    ),
    _beside("transformers", "newest", TRANSFORMERS),
    _beside(
        "diffusers",
        "0.32.2",
        ("tests/integrations/test_diffusers_offload.py",),
        *("transformers==4.46.3", "tokenizers<0.21", "huggingface_hub<1"),
    ),
    _beside("diffusers", "newest", ("tests/integrations/test_diffusers_offload.py",)),
    *(
        _beside("accelerate", release, DISPATCHED, keyword=STORIES)
        for release in ("0.34.2", "1.0.1", "newest")
    ),
    *(
        _beside("torchao", release, KINDS, keyword="torchao", every_kind=True)
        for release in ("0.9.0", "0.12.0", "newest")
    ),
    *(_python(release) for release in ("3.10", "3.12", "3.13", "3.14")),
    Cell("Python", "3.11", tests=("tests/releases", *KINDS)),
)


def main() -> None:
    """Tries the cells, and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="of the environments")
    parser.add_argument("--only", default="", help="an axis, or the name of a cell")
    parser.add_argument("--render", action="store_true", help="write the document alone")
    options = parser.parse_args()
    before = json.loads(RESULTS.read_text(encoding="utf-8"))["releases"] if RESULTS.exists() else {}
    cells: dict[str, Any] = dict(before.get("by_cell", {}))
    if not options.render:
        for cell in CELLS:
            if options.only in ("", cell.axis, cell.name):
                print(f"== {cell.name}", flush=True)
                cells[cell.name] = try_cell(cell, options.folder.resolve())
                _write(cells)  # at once: a later one may be stopped
    DOCUMENT.write_text(render(cells), encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


def try_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """What came of one cell; what cannot be had says why."""
    result: dict[str, Any] = {
        "axis": cell.axis,
        "release": cell.release,
        "date": _today(),
        "commit": _commit(),
        "tests": [*cell.tests, *([f"-k {cell.keyword}"] if cell.keyword else [])],
        "note": cell.note,
    }
    try:
        python, environment = _prepare(cell, folder)
    except CannotBeHad as error:
        return {**result, "absent": str(error)}
    result["with"] = _versions(python, environment)
    report = folder / f"{cell.name}.xml"
    report.unlink(missing_ok=True)
    own = ["--confcutdir=tests/releases"] if cell.alone else []
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *own]
    command += [
        f"--junitxml={report}",
        *cell.tests,
        *(["-k", cell.keyword] if cell.keyword else []),
    ]
    began = time.monotonic()
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (folder / f"{cell.name}.log").write_text(ended.stdout + ended.stderr, encoding="utf-8")
    result["minutes"] = round((time.monotonic() - began) / 60, 1)
    if not report.exists():
        return {
            **result,
            "absent": f"its tests did not run: {_last_line(ended.stderr or ended.stdout)}",
        }
    return result | counted(report)


class CannotBeHad(Exception):
    """Why a cell has no environment."""


def _prepare(cell: Cell, folder: Path) -> tuple[Path, dict[str, str]]:
    """The Python of a cell and its environment variables; installs what is not there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["PYTHONPATH"] = str(ROOT)
    if cell.every_kind:
        environment["QMOVE_KINDS"] = "all"
    place = folder / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    done = place / ".installed"
    if not cell.alone:
        if cell.packages:
            if not done.exists():
                _pip(Path(sys.executable), "--no-deps", "--target", str(place), *cell.packages)
                done.touch()
            environment["PYTHONPATH"] = os.pathsep.join((str(place), str(ROOT)))
        return Path(sys.executable), environment
    environment["TORCHDYNAMO_DISABLE"] = "1"
    python = place / "bin" / "python"
    if not done.exists():
        base = shutil.which(f"python{cell.python}") if cell.python else sys.executable
        made = base and subprocess.run(
            [base, "-m", "venv", str(place)], capture_output=True, text=True
        )
        if not made or made.returncode:
            raise CannotBeHad(f"there is no Python {cell.python} on this machine")
        _pip(python, *cell.packages)
        done.touch()
    return python, environment


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise CannotBeHad(f"pip: {_last_line(ended.stderr)}")


def _versions(python: Path, environment: dict[str, str]) -> str:
    code = (
        "import sys, importlib.metadata as m\n"
        "names = 'torch bitsandbytes transformers diffusers accelerate torchao optimum-quanto'.split()\n"
        "there = {d.metadata['Name']: d.version for d in reversed(list(m.distributions())) if d.metadata['Name'] in names}\n"
        "print('Python ' + sys.version.split()[0], *(f'{n} {there[n]}' for n in names if n in there), sep=', ')"
    )
    done = subprocess.run(
        [str(python), "-c", code], env=environment, capture_output=True, text=True
    )
    return done.stdout.strip()


def counted(report: Path) -> dict[str, Any]:
    """Passed, failed and skipped of a run, with the reasons, from its JUnit file."""
    passed, failed, skipped = 0, [], Counter[str]()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        broken = next((c for c in case if c.tag in ("failure", "error")), None)
        left_out = case.find("skipped")
        if broken is not None:
            message = _last_line(broken.get("message") or "")
            told = _without_paths(message)[:200]
            failed.append(f"{case.get('classname')}::{case.get('name')}: {told}")
        elif left_out is not None:
            why = str(left_out.get("message")).removeprefix("Skipped: ")
            skipped[_without_paths(why)[:200]] += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": dict(skipped.most_common())}


def _write(cells: Mapping[str, Any]) -> None:
    cells = {cell.name: cells[cell.name] for cell in CELLS if cell.name in cells}
    failures = [
        f"{name}: {failure}" for name, cell in cells.items() for failure in cell.get("failed", ())
    ]
    whole = {
        "date": _today(),
        "commit": _commit(),
        "minutes": round(sum(cell.get("minutes", 0) for cell in cells.values()), 1),
        "cells": len(cells),
        "passed": sum(cell.get("passed", 0) for cell in cells.values()),
        "failures": failures,
        "by_cell": cells,
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"releases": whole}, indent=1) + "\n", encoding="utf-8")


def render(cells: Mapping[str, Any]) -> str:
    """The document, of the results of the cells by name."""
    lines = [
        "# Releases",
        "",
        "Written by `make matrix` (`tools/matrix.py`, where the cells stand) from [docs/results/matrix.json](results/matrix.json).",
        "Every cell was run; what was not tried in it is said below the table. The GPU was the simulated one, or there was none.",
        "",
        "| what | release | ran with | tests | passed | failed | left out | when, commit |",
        "|---|---|---|---|--:|--:|--:|---|",
    ]
    notes: list[str] = []
    for cell in cells.values():
        when = f"{cell['date']}, {cell['commit']}"
        if "absent" in cell:
            lines.append(
                f"| {cell['axis']} | {cell['release']} | not run: {_plain(cell['absent'])} | | | | | {when} |"
            )
            continue
        name = f"**{cell['axis']} {cell['release']}**"
        if cell["note"]:
            notes.append(f"- {name}: {cell['note']}.")
        notes += [f"- {name}, failed: {_plain(failure)}" for failure in cell["failed"]]
        notes += [f"- {name}, left out {n}: {_plain(why)}" for why, n in cell["skipped"].items()]
        tests = _plain(" ".join(cell["tests"]).replace("tests/", ""))
        left_out = sum(cell["skipped"].values())
        lines.append(
            f"| {cell['axis']} | {cell['release']} | {cell['with']} | {tests} | {cell['passed']} "
            f"| {len(cell['failed'])} | {left_out} | {when} |"
        )
    return "\n".join([*lines, "", "## What a cell does not show", "", *notes]) + "\n"


def _without_paths(text: str) -> str:
    """Without the machine's folders: only the names of files stay."""
    return re.sub(r"(?<![\w.:/])(?:[A-Za-z]:)?[/\\](?:[^\s/\\()]+[/\\])+", "", text)


def _plain(text: str) -> str:
    return _without_paths(re.sub(r"\s+", " ", text)).replace("|", "\\|")


def _last_line(text: str) -> str:
    lines = [
        line
        for line in text.strip().splitlines()
        if line.strip() and not line.startswith("WARNING")
    ]
    wanted = [line for line in lines if "ERROR" in line or "Error" in line]
    return (wanted or lines or ["no word"])[-1].strip()


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def _commit() -> str:
    git = ["git", "describe", "--always", "--abbrev=12", "--exclude=*"]
    return subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
