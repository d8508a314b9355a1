"""A process that is killed while it parks on disk, at every write, sync and rename: the next one finds
the model that was there before, or the new one, to every byte; and what was left is removed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory.disk_files import WEIGHTS
from tests.builders.device import GPU
from tests.builders.disk import files_in
from tests.builders.models import layers
from tests.builders.snapshots import contents

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each point is tried in a fork"),
]

ROOT = Path(__file__).parents[2]

_IMPORTS = """
import os, signal, sys
import tests.builders.device
import torch
import qmove_core as qmove
from pathlib import Path
from tests.builders.disk import Steps, counted
from tests.builders.models import layers

def model(fill):
    made = layers(3)
    for parameter in made.parameters():
        parameter.data.fill_(fill)
    return made

def in_a_fork(act):
    pid = os.fork()
    if not pid:
        act()
        os._exit(0)
    return os.waitpid(pid, 0)[1]

def killed_at(number, act):
    with counted(Steps(number, lambda: os.kill(os.getpid(), signal.SIGKILL))):
        act()
"""


def run(body: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORTS + textwrap.dedent(body), *arguments],
        cwd=ROOT,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def filled(value: float) -> nn.Sequential:
    model = layers(3)
    for parameter in model.parameters():
        parameter.data.fill_(value)
    return model


@pytest.mark.parametrize("before", ["nothing", "another model"])
def test_killed_at_every_step_the_old_one_or_the_new_one_is_there(
    gpu: GPU, tmp_path: Path, before: str
) -> None:
    statuses = run(
        """
        folder, before = Path(sys.argv[1]), sys.argv[2]
        number = 0
        while True:
            number += 1
            kept = folder / str(number)
            if before != "nothing":
                assert in_a_fork(lambda: qmove.park(model(1.0), to="disk", folder=kept)) == 0
            status = in_a_fork(
                lambda: killed_at(number, lambda: qmove.park(model(2.0), to="disk", folder=kept))
            )
            print(status)
            if status == 0:
                break
        """,
        str(tmp_path),
        before,
    ).split()
    assert set(statuses[:-1]) == {str(int(signal.SIGKILL))} and statuses[-1] == "0"
    assert len(statuses) > 9
    old, new = contents(filled(1.0)), contents(filled(2.0))
    found = []
    for number in range(1, len(statuses) + 1):
        folder, model = tmp_path / str(number), filled(3.0)
        if (folder / WEIGHTS).exists():
            qmove.attach(model, folder, "cuda:0")
            assert contents(model) in (old, new), f"killed at step {number}"
            found.append("new" if contents(model) == new else "old")
        else:
            untouched = contents(model)
            with pytest.raises(qmove.CannotAttach):
                qmove.attach(model, folder)
            assert contents(model) == untouched
            found.append("nothing")
        left = [name for name in files_in(folder) if name != WEIGHTS]
        assert left == [], "what the process had begun is removed"
    was = "nothing" if before == "nothing" else "old"
    assert found == [was] * (len(found) - 2) + ["new"] * 2, "it is there with the rename"


def test_temporary_files_of_a_killed_process_are_removed_and_of_a_living_one_are_not(
    gpu: GPU, tmp_path: Path
) -> None:
    folder = tmp_path / "parked"
    qmove.configure(disk_folder=folder)
    mine = filled(1.0)
    qmove.park(mine, to="disk")
    kept = files_in(folder)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _IMPORTS
            + textwrap.dedent(
                """
                qmove.configure(disk_folder=sys.argv[1])
                parked = model(5.0)
                qmove.park(parked, to="disk")
                print("parked", flush=True)
                sys.stdin.read()
                """
            ),
            str(folder),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "parked\n"
    (theirs,) = set(files_in(folder)) - set(kept)
    other = filled(2.0)
    qmove.park(other, to="disk")
    assert theirs in files_in(folder), "that process lives"
    child.kill()
    child.communicate()
    assert theirs in files_in(folder)
    third = filled(3.0)
    qmove.park(third, to="disk")
    assert theirs not in files_in(folder) and set(kept) < set(files_in(folder))
    qmove.restore(mine)
    assert torch.equal(mine[0].weight, torch.full_like(mine[0].weight, 1.0))


def test_a_process_that_ends_takes_its_temporary_files_along(tmp_path: Path) -> None:
    run(
        """
        qmove.configure(disk_folder=sys.argv[1])
        parked = model(5.0)
        qmove.park(parked, to="disk")
        assert len(os.listdir(sys.argv[1])) == 1
        pid = os.fork()
        if not pid:
            sys.exit()  # what a child does at its end is not its parent's end
        os.waitpid(pid, 0)
        assert len(os.listdir(sys.argv[1])) == 1
        qmove.restore(parked)
        """,
        str(tmp_path / "parked"),
    )
    assert files_in(tmp_path / "parked") == []


def test_killed_in_the_middle_of_a_spill_what_stays_in_that_folder_is_whole(
    gpu: GPU, tmp_path: Path
) -> None:
    """What a pool sends to disk are temporary files: after a restart none is left, and the models
    that were parked to stay beside them are attached to every byte."""
    folder = tmp_path / "pool"
    statuses = run(
        """
        folder, number = Path(sys.argv[1]), 0
        qmove.configure(disk_folder=folder)
        folder.mkdir()
        kept = lambda: qmove.park(model(1.0), to="disk", folder=folder / "kept")
        assert in_a_fork(kept) == 0
        while True:
            number += 1
            spill = lambda: killed_at(number, lambda: qmove.park(model(2.0), to="disk"))
            print(in_a_fork(spill))
            if number == 5:
                break
        """,
        str(folder),
    ).split()
    assert set(statuses) == {str(int(signal.SIGKILL))}
    assert len(files_in(folder)) > 1
    model, other = filled(3.0), filled(4.0)
    qmove.attach(model, folder / "kept", "cuda:0")
    assert contents(model) == contents(filled(1.0))
    qmove.configure(disk_folder=folder)
    qmove.park(other, to="disk")
    assert len([name for name in files_in(folder) if name != "kept"]) == 1, "its own"
    qmove.restore(other)
    assert contents(other) == contents(filled(4.0))
