"""`make gpu-check` over the simulated GPU: all that must hold on a card holds there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu_check import report
from tools.gpu_check.checks import Check, Checks, read
from tools.gpu_check.steps import STEPS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.simulated


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.gpu_check", "--simulated", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_step_runs_and_nothing_fails(tmp_path: Path) -> None:
    done = run("--json", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    failed = [check for check in result["checks"] if check["status"] == "failed"]
    assert (failed, done.returncode) == ([], 0), done.stdout + done.stderr
    assert {check["step"] for check in result["checks"]} == {step.name for step in STEPS}
    assert result["simulated"] is True
    assert result["summary"]["passed"] > 90


def test_an_unknown_step_is_named_with_those_there_are() -> None:
    done = run("--step", "warp")
    assert done.returncode == 1
    assert "There is no step named warp. The steps are: facts, pins," in done.stderr


def test_checks_outlive_a_crash_of_their_step(tmp_path: Path) -> None:
    checks = Checks("odd", tmp_path / "checks")
    checks.expect("a", True)
    checks.expect("b", False, "3 of 4", "exact")
    with checks.no_error("c", "pins"):
        raise RuntimeError("CUDA error: it is gone\nmore")
    first, second, third = read(tmp_path / "checks")
    assert first == Check("odd", "a", "passed")
    assert second == Check("odd", "b", "failed", "3 of 4", ("exact",))
    assert third.status == "failed" and third.detail.startswith(
        "RuntimeError: CUDA error: it is gone"
    )


def test_the_page_of_a_card_has_its_name_and_the_links_constants(tmp_path: Path) -> None:
    checks = [
        Check("facts", "card", "figure", "NVIDIA RTX 9999 | Ti"),
        Check("link", "link: h2d_pinned", "figure", "5.5e+10"),
        Check("races", "a", "failed", "1 of 2", ("streams",)),
    ]
    path = report.write_page(tmp_path, checks, 12.0)
    page = path.read_text()
    assert path.name == "nvidia-rtx-9999-ti.md"
    assert "replace(simcuda.link.PCIE4, h2d_pinned=5.5e+10)" in page
    assert "0 passed, 1 failed, 0 skipped" in page
    assert "NVIDIA RTX 9999 \\| Ti" in page
