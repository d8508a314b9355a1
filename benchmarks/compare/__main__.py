"""qmove beside its peers, in one run: `make bench`, or `python -m benchmarks.compare [--quick]
[--large] [--out FOLDER]`.

Every measurement runs in a process of its own. Without a GPU they run on the simulated one, whose
seconds are those of its link model; the page says so. The whole run takes a quarter of an hour on
two cores and up to 12 GB of RAM and 8 GB of disk; `--quick`, with tiny models, under a minute or
two, and writes nothing unless it is told where.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import contenders, forwards, little_room, machine, page, plots, terminal, workloads
from .targets import SWAP_LINKS

ROOT = Path(__file__).resolve().parents[2]
CONTENDERS = [contender.name for contender in contenders.ALL]
MOST_RAM = (
    14e9  # bytes that a measurement may take together with its simulated VRAM; --large lifts it
)
TIMEOUT = 1800  # seconds for one process


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny models: does it all work?")
    parser.add_argument(
        "--large",
        action="store_true",
        help="also what takes more than 14 GB of RAM (a model of 8 GB)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where to write docs/ and benchmarks/results/ (default: this checkout)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the share of the layers that the models of the swaps have",
    )
    parser.add_argument(
        "--scratch", type=Path, help="where the models are written (default: the temporary folder)"
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="only this contender; may be repeated"
    )
    parser.add_argument(
        "--from",
        dest="kept",
        type=Path,
        metavar="FILE",
        help="measure nothing, show kept results again",
    )
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200)
    results = (
        json.loads(options.kept.read_text(encoding="utf-8"))
        if options.kept
        else Run(console, options).all()
    )
    terminal.show(console, results)
    out = options.out or (None if options.quick else ROOT)
    if out is not None:
        write(results, out)
        console.print(f"written: {out / 'docs' / 'benchmark.md'}")


def write(results: dict[str, Any], out: Path) -> None:
    """The results as JSON, the page and its plots."""
    where = results["machine"]
    kind = "simulated" if results["simulated"] else "gpu"
    kept, docs = out / "benchmarks" / "results", out / "docs"
    kept.mkdir(parents=True, exist_ok=True)
    docs.mkdir(parents=True, exist_ok=True)
    (kept / f"{where['date']}-{kind}.json").write_text(
        json.dumps(without_tracebacks(results), indent=1) + "\n", encoding="utf-8"
    )
    plots.swaps(results, docs / "benchmark.svg")
    plots.growth(results, docs / "benchmark-growth.svg")
    (docs / "benchmark.md").write_text(page.page(results), encoding="utf-8")


def scaled(workload: workloads.Workload, share: float) -> workloads.Workload:
    """The same model with fewer layers; thousands of tensors stay thousands."""
    many = workload.layers >= 1000
    return workload if many else replace(workload, layers=max(2, round(workload.layers * share)))


def without_tracebacks(results: Any) -> Any:
    """They name folders of this machine, and are for the terminal."""
    if isinstance(results, dict):
        return {
            key: without_tracebacks(value) for key, value in results.items() if key != "traceback"
        }
    return (
        [without_tracebacks(value) for value in results] if isinstance(results, list) else results
    )


class Run:
    """One run of everything. Quick ones measure no time, so that two processes may run at once."""

    def __init__(self, console: Console, options: argparse.Namespace) -> None:
        self.options, self.simulated = options, not machine.has_gpu_build()
        self.links: list[str | None] = ["pcie4", "pcie5"] if self.simulated else [None]
        self.moves_on = self.links[:1] if options.quick else self.links
        self.contenders = [name for name in CONTENDERS if not options.only or name in options.only]
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, transient=True)
        self.bar = self.progress.add_task("")

    def all(self) -> dict[str, Any]:
        """The results, as they are kept."""
        quick = self.options.quick
        models = [scaled(workload, self.options.scale) for workload in workloads.workloads(quick)]
        counts = [100] if quick else [100, 1_000, 10_000, 100_000]
        sizes = [10**6] if quick else [10**7, 10**8, 10**9, 2 * 10**9, 4 * 10**9, 8 * 10**9]
        rounds = 1 if quick else 3
        beside = {"tensors": 120, "nbytes": 10**6 if quick else 500 * 10**6, "rounds": rounds}
        by_tensors = [
            {"tensors": count, "nbytes": 128 * count, "rounds": rounds} for count in counts
        ]
        by_bytes = [
            {"tensors": 64, "nbytes": size, "rounds": 1 if size > 10**9 else rounds}
            for size in sizes
        ]
        turns = [
            {"case": case, "way": way, "tensors": 120, "nbytes": beside["nbytes"]}
            for case in little_room.CASES
            for way in little_room.WAYS
        ]
        forward = {"width": 256, "layers": 8 if quick else 24}
        forward |= {"rounds": 2 if quick else 9, "pairs": 3 if quick else 60}
        steps = (
            len(turns)
            + len(forwards.PRECISIONS)
            + len(models) * (1 + len(self.contenders) + len(self.moves_on))
            + 1
            + len(counts)
            + len(sizes)
        )
        self.progress.update(self.bar, total=steps)
        with self.progress, ThreadPoolExecutor(2 if quick else 1) as self.pool:
            return {
                "simulated": self.simulated,
                "quick": quick,
                "links": self.links,
                "swap links": list(SWAP_LINKS) if self.simulated else self.links,
                "machine": machine.describe(
                    "a simulated GPU (simcuda)" if self.simulated else _gpu_name()
                ),
                "workloads": [self._workload(workload) for workload in models],
                "beside a copy": self._child("beside a copy", beside, "beside a plain copy"),
                "little room": [self._turns(request) for request in turns],
                "forwards": [
                    self._forward({"precision": precision, **forward})
                    for precision in forwards.PRECISIONS
                ],
                "by tensors": list(self.pool.map(self._size, by_tensors)),
                "by bytes": list(self.pool.map(self._size, by_bytes)),
            }

    def _workload(self, workload: workloads.Workload) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="qmove-bench-", dir=self.options.scratch) as folder:
            request = {"workload": asdict(workload), "folder": folder}
            prepared = self._child("prepare", request, f"{workload.name}: writing the models")
            if "error" in prepared:
                raise SystemExit(
                    f"the models could not be made: {prepared['error']}\n{prepared.get('traceback', '')}"
                )
            swaps = {
                name: self.pool.submit(
                    self._child, "swaps", {**request, "contender": name}, f"{workload.name}: {name}"
                )
                for name in self.contenders
            }
            moves = {
                link or "wall": self.pool.submit(
                    self._child,
                    "moves",
                    {**request, "link": link},
                    f"{workload.name}: qmove alone, {link or ''}",
                )
                for link in self.moves_on
            }
            return {
                **asdict(workload),
                **prepared,
                "contenders": {name: future.result() for name, future in swaps.items()},
                "moves": {link: future.result() for link, future in moves.items()},
            }

    def _turns(self, request: dict[str, Any]) -> dict[str, Any]:
        return request | self._child("little room", request, f"{request['case']}: {request['way']}")

    def _forward(self, request: dict[str, Any]) -> dict[str, Any]:
        what = f"{request['precision']}: a forward before and after"
        return request | self._child("forward", request, what)

    def _size(self, request: dict[str, Any]) -> dict[str, Any]:
        needed = (2.1 if self.simulated else 1.1) * request["nbytes"] + 10**9
        free = psutil.virtual_memory().available
        limit = free if self.options.large else min(free, MOST_RAM)
        if needed > limit:
            self.progress.advance(self.bar)
            why = f"not measured: needs {needed / 1e9:.1f} GB of RAM, {limit / 1e9:.1f} GB may be used"
            return {**request, "error": why + ("" if self.options.large else " (--large uses all)")}
        return self._child(
            "one size",
            request,
            f"{request['tensors']:,} tensors, {request['nbytes'] / 1e6:,.3g} MB",
        )

    def _child(self, task: str, request: dict[str, Any], what: str) -> dict[str, Any]:
        """What the process answered; how it died, if it did."""
        self.progress.update(self.bar, description=what)
        simulation = ["-m", "simcuda", "--memory", "24GiB"] if self.simulated else []
        command = [
            sys.executable,
            *simulation,
            "-m",
            "benchmarks.compare.child",
            task,
            json.dumps(request),
        ]
        # Threads that wait without spinning (see the Makefile); and without CUDA kernels
        # bitsandbytes compiles its own for each shape, which takes minutes, where uncompiled ones
        # do as well.
        environment = {
            "OMP_WAIT_POLICY": "PASSIVE",
            **({"TORCHDYNAMO_DISABLE": "1"} if self.simulated else {}),
            **os.environ,
        }
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=environment,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {TIMEOUT} s"}
        finally:
            self.progress.advance(self.bar)
            self.progress.print(
                f"{time.perf_counter() - started:6.1f} s  {what}", markup=False, highlight=False
            )
        lines = done.stdout.strip().splitlines()
        if done.returncode != 0 or not lines:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            return {"error": f"the process ended with {done.returncode}: {last}"}
        return dict(json.loads(lines[-1]))


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


if __name__ == "__main__":
    main()
