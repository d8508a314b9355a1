"""Processes: forks, children, pickles, and an interpreter that ends while something arrives."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.streaming import pickled, saved
from tests.faults.builders.runs import ROOT

pytestmark = pytest.mark.simulated

SECONDS = 120  # that a process may take; it hangs otherwise

STATES: dict[str, Callable[[nn.Module], object]] = {
    "parked": qmove.park,
    "arriving": lambda m: (qmove.park(m), qmove.restore(m, stream=True)),
    "woken in part": lambda m: (qmove.park(m), m[0](inputs())),
    "woken": lambda m: (qmove.park(m), m(inputs())),
    "moved to the CPU": lambda m: qmove.move(m, "cpu"),
    "home with mirrors": lambda m: (qmove.park(m), qmove.restore(m)),
}
every_state = pytest.mark.parametrize("state", STATES)


@pytest.fixture(autouse=True)
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SMALL", 0)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
}


@every_state
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_in_any_state_is_an_ordinary_model_and_changes_nothing(
    gpu: GPU, state: str, how: str
) -> None:
    model = layers(3)
    expected = model(inputs()).cpu()
    STATES[state](model)
    copied = COPIES[how](model)
    assert type(copied) is nn.Sequential and type(copied[0]) is nn.Linear
    assert torch.equal(copied.to("cuda")(inputs()).cpu(), expected)
    assert {type(p) for p in copied.parameters()} == {nn.Parameter}
    qmove.move(model, "cuda:0")
    streaming.wait_for()
    assert torch.equal(model(inputs()).cpu(), expected)


def _run(body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a Python of its own, with the simulated GPU."""
    script = "import tests.builders.device\nimport torch\nimport qmove_core as qmove\n"
    script += (
        "from tests.builders.models import inputs, layers\nfrom qmove_core.transfer import copies\n"
    )
    script += "copies.SMALL = 0\n" + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


ENDINGS = {
    "while a model arrives": "m = layers(4); qmove.park(m); qmove.restore(m, stream=True)",
    "while host memory is prepared": "m = layers(4, width=2048); qmove.prepare(m)",
    "with a parked model": "m = layers(4); qmove.park(m)",
    "with a woken part": "m = layers(4); qmove.park(m); m[0](inputs())",
    "in an exception": "m = layers(4); qmove.park(m); qmove.restore(m, stream=True); m(None)",
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_interpreter_ends(name: str) -> None:
    ended = _run(ENDINGS[name])
    fails = name == "in an exception"
    assert ended.returncode == (1 if fails else 0), ended.stderr[-2000:]
    told = [line for line in ended.stderr.splitlines() if "Exception ignored" in line]
    assert not told, ended.stderr[-2000:]


def test_a_spawned_child_computes_the_same_with_a_pickled_parked_model() -> None:
    ended = _run("""
        import pickle, subprocess, sys
        m = layers(3)
        expected = m(inputs()).cpu()
        qmove.park(m)
        child = (
            "import sys, pickle, tests.builders.device, torch; "
            "m, x = pickle.load(sys.stdin.buffer); "
            "pickle.dump(m.cuda()(x.cuda()).cpu(), sys.stdout.buffer)"
        )
        ended = subprocess.run([sys.executable, "-c", child], input=pickle.dumps((m, inputs().cpu())),
                               stdout=subprocess.PIPE, check=True)
        assert torch.equal(pickle.loads(ended.stdout), expected)
        assert qmove.is_parked(m)
    """)
    assert ended.returncode == 0, ended.stderr[-2000:]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@needs_fork
def test_a_forked_child_can_ask_and_end_while_another_thread_of_the_parent_moves(gpu: GPU) -> None:
    ended = _run("""
        import faulthandler, os, threading
        m = layers(3)
        going, stop = threading.Event(), threading.Event()
        def move():
            while not stop.is_set():
                qmove.park(m)
                going.set()
                qmove.restore(m)
        thread = threading.Thread(target=move)
        thread.start()
        going.wait()
        try:
            for _ in range(20):
                child = os.fork()
                if child == 0:
                    faulthandler.dump_traceback_later(20, exit=True)
                    qmove.stats()
                    qmove.parked_models()
                    qmove.is_parked(m)
                    os._exit(0)
                assert os.waitpid(child, 0)[1] == 0
        finally:
            stop.set()
            thread.join()
    """)
    assert ended.returncode == 0, ended.stderr[-3000:]


@needs_fork
def test_a_forked_child_reads_the_bytes_of_a_parked_model() -> None:
    ended = _run("""
        import faulthandler, os
        from tests.builders.snapshots import contents
        from tests.builders.streaming import pickled
        m = layers(3)
        expected = contents(m)
        qmove.park(m)
        assert qmove.stats().pinned_bytes > 0
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(60, exit=True)
            read = contents(pickled(m))
            os._exit(0 if read == expected else 3)
        assert os.waitpid(child, 0)[1] == 0
        qmove.restore(m)
        assert contents(m) == expected
        with torch.no_grad():
            m[0].weight.add_(1)
        expected = contents(m)
        qmove.park(m)  # the parent's locked memory is still its own
        assert contents(pickled(m)) == expected
    """)
    assert ended.returncode == 0, ended.stderr[-3000:]


@needs_fork
def test_workers_of_a_data_loader_leave_a_parked_model_alone() -> None:
    ended = _run("""
        from torch.utils.data import DataLoader, Dataset
        class Rows(Dataset):
            def __len__(self):
                return 8
            def __getitem__(self, index):
                assert qmove.stats().parked_models == 1
                return torch.full((64,), float(index))
        m = layers(3)
        expected = m(inputs())
        qmove.park(m)
        for batch in DataLoader(Rows(), batch_size=2, num_workers=2, multiprocessing_context="fork"):
            assert batch.shape == (2, 64)
        assert qmove.is_parked(m) and torch.equal(m(inputs()), expected)
    """)
    assert ended.returncode == 0, ended.stderr[-3000:]
