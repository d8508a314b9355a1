"""`python -m tools.gpu_check`: runs the steps, prints one table, writes JSON and a report.

The exit code is the number of failures, 100 at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import report
from .checks import Check, read
from .steps import STEPS, Step

ROOT = Path(__file__).parents[2]


def main() -> int:
    options = _parser().parse_args()
    simulated = options.simulated or not _has_gpu()
    wanted = [step for step in STEPS if not options.step or step.name in options.step]
    if unknown := set(options.step or ()) - {step.name for step in wanted}:
        names = ", ".join(step.name for step in STEPS)
        sys.exit(f"There is no step named {', '.join(sorted(unknown))}. The steps are: {names}.")
    checks: list[Check] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for step in wanted:
            file = Path(folder) / step.name
            if simulated and not step.simulated:
                checks.append(
                    Check(step.name, "runs", "skipped", "the simulated GPU has one allocator")
                )
                continue
            checks += _run(step, file, simulated)
    seconds = time.monotonic() - started
    report.show(checks, seconds, simulated, options.all)
    if options.json:
        Path(options.json).write_text(report.as_json(checks, seconds, simulated), encoding="utf-8")
    if not simulated:
        print("Report:", report.write_page(ROOT / "docs" / "gpu", checks, seconds))
    return min(100, sum(check.status == "failed" for check in checks))


def _unkind() -> list[str]:
    """QMOVE_SIMULATOR=hostile or, for example, hostile,async: the simulated GPU leaves nothing out."""
    mode, _, allocator = os.environ.get("QMOVE_SIMULATOR", "").partition(",")
    return ["--hostile", allocator or "native"] if mode == "hostile" else []


def _run(step: Step, file: Path, simulated: bool) -> list[Check]:
    """Runs one step in a process of its own. Its end is a check too."""
    launch = [sys.executable, "-m"]
    if simulated:
        launch += ["simcuda", "--devices", "2", "--memory", "512MiB", *_unkind(), "-m"]
    launch += ["tools.gpu_check.child", step.name, str(file), json.dumps({})]
    environment = dict(os.environ)
    if step.allocator is not None:
        environment["PYTORCH_CUDA_ALLOC_CONF"] = step.allocator
    if simulated:  # bitsandbytes would compile a kernel of its own for each shape
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")
    print(f"{step.name} ...", flush=True)
    try:
        done = subprocess.run(
            launch, cwd=ROOT, env=environment, timeout=step.seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return [
            *read(file),
            Check(
                step.name, "ends in time", "failed", f"stopped after {step.seconds} s", ("hang",)
            ),
        ]
    if done.returncode == 0:
        return read(file)
    last = done.stderr.strip().splitlines()[-1:] or [""]
    detail = f"exit code {done.returncode}: {last[0]}"
    return [*read(file), Check(step.name, "runs to its end", "failed", detail, ("crash",))]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument(
        "--simulated", action="store_true", help="over the simulated GPU, also where there is one"
    )
    parser.add_argument(
        "--step", action="append", metavar="NAME", help="only this step; repeatable"
    )
    parser.add_argument("--all", action="store_true", help="print every check and figure")
    parser.add_argument("--json", metavar="FILE", help="where to write the result as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
