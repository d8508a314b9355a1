"""The oldest accelerate that dispatched models are materialized with: `tools/setup_env.py` installs
it beside the newest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("QMOVE_OLDEST_ACCELERATE", Path(sys.prefix) / "oldest-accelerate"))
TESTS = Path(__file__).parents[1]
STORIES = (
    "becomes_an_ordinary_one or very_same_dispatch or parked_dispatch_wakes or old_map_again "
    "or damaged or truncated"
)


@pytest.mark.skipif(
    not (FOLDER / "accelerate").is_dir(), reason=f"accelerate 0.34.2 is not installed in {FOLDER}"
)
def test_the_same_stories_with_the_oldest_accelerate() -> None:
    files = (
        "materialize/test_materialize.py",
        "integrations/test_accelerate_dispatch.py",
        "methods/test_redispatch.py",
        "integrations/test_parking_dispatched.py",
        "integrations/test_weights_map.py",
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        STORIES,
        *(str(TESTS / file) for file in files),
    ]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    version = [sys.executable, "-c", "import accelerate; print(accelerate.__version__)"]
    assert (
        subprocess.run(version, env=environment, capture_output=True, text=True).stdout.strip()
        == "0.34.2"
    )
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout and "failed" not in run.stdout
