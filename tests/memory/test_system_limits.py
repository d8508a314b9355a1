"""Limits that the system enforces, and not a stand-in for them: a park that does not fit is refused
before the first byte, and the process lives."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmove_core.memory.limits import HEADROOM

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(sys.platform != "linux", reason="other systems enforce no such limits"),
]

ROOT = Path(__file__).parents[2]
SECONDS = 300  # that a process may take; it hangs otherwise
MIB = 1 << 20
MODEL_MIB = 64  # and some KiB
# MiB that a limit leaves, from what is far too little to what is more than enough.
LEFT = (0, 1, 16, 48, 63, 64, 65, 96, 120, 127, 128, 130, 160, 256)


def _run(body: str, *arguments: str) -> str:
    script = """
        import sys
        import tests.builders.device
        import torch
        import qmove_core as qmove
        from tests.builders.models import layers
        from tests.builders.snapshots import contents

        model = layers(4, width=2048)  # its bytes on the simulated device are there already
        before = contents(model)
        qmove.park(layers(1)); qmove.trim()  # all threads and libraries too
        needed = qmove.inventory(model).nbytes

        def attempt(name):
            try:
                qmove.park(model)
            except qmove.NotEnoughMemory as error:
                assert name in str(error), error
                assert not qmove.is_parked(model)
                return "refused"
            assert qmove.is_parked(model)
            return "parked"

        def check():
            qmove.restore(model)
            assert contents(model) == before
            qmove.trim()  # and so the next park takes new memory
    """
    ended = subprocess.run(
        [
            sys.executable,
            "-X",
            "faulthandler",
            "-c",
            textwrap.dedent(script) + textwrap.dedent(body),
            *arguments,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, (ended.returncode, ended.stdout, ended.stderr[-3000:])
    return ended.stdout


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_park_beyond_ulimit_is_refused_with_the_name_of_the_limit(kind: str) -> None:
    said = _run(
        """
        import psutil, resource
        kind, names = sys.argv[1], {"RLIMIT_AS": ("vms", "ulimit -v"), "RLIMIT_DATA": ("data", "ulimit -d")}
        field, name = names[kind]
        for left in map(int, sys.argv[2:]):
            used = getattr(psutil.Process().memory_info(), field)
            resource.setrlimit(getattr(resource, kind), (used + (left << 20), -1))
            print(left, attempt(name))
            resource.setrlimit(getattr(resource, kind), (-1, -1))
            check()
        """,
        kind,
        *map(str, LEFT),
    )
    outcomes = dict(line.split() for line in said.splitlines())
    fits = MODEL_MIB + HEADROOM // MIB
    assert outcomes == {str(left): "parked" if left > fits else "refused" for left in LEFT}


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A real cgroup of this test, below the one that it runs in."""
    root, groups = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup").read_text().splitlines()
    (path, v2) = next(
        (
            (root / "memory" / line.split(":", 2)[2].lstrip("/"), False)
            for line in groups
            if "memory" in line.split(":")[1].split(",")
        ),
        (root / groups[-1].split(":", 2)[2].lstrip("/"), True),
    )
    group = path / f"qmove-test-{os.getpid()}"
    limit = group / ("memory.max" if v2 else "memory.limit_in_bytes")
    try:
        group.mkdir()
        limit.write_text(str(1 << 40))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no cgroup may be made here: {error}")
    yield group
    group.rmdir()


def test_a_park_beyond_a_cgroup_is_refused_and_nobody_is_killed(cgroup: Path) -> None:
    said = _run(
        """
        import os, pathlib
        group = pathlib.Path(sys.argv[1])
        v2 = (group / "memory.max").exists()
        limit = group / ("memory.max" if v2 else "memory.limit_in_bytes")
        usage = group / ("memory.current" if v2 else "memory.usage_in_bytes")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            for left in map(int, sys.argv[2:]):
                limit.write_text(str(int(usage.read_text()) + (left << 20)))
                print(left, attempt("cgroup limit"), flush=True)
                limit.write_text(str(1 << 40))
                check()
        finally:
            (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        """,
        str(cgroup),
        *map(str, LEFT),
    )
    outcomes = dict(line.split() for line in said.splitlines())
    assert outcomes["0"] == outcomes["48"] == outcomes["64"] == "refused"
    assert outcomes["256"] == "parked"
