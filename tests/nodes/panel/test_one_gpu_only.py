"""The import of the pack, its panel and moves make a context on the model's GPU, and on no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from qmove_pack.nodes.host import meter
from qmove_pack.nodes.host.panel import state
from qmove_pack.nodes.host.stages import needs

import qmove_core

pytestmark = pytest.mark.simulated
ROOT = Path(qmove_core.__file__).parent.parent

PROGRAM = """
import tests.builders.device  # brings two simulated GPUs up
import simcuda
simcuda.reset_contexts("300MiB")
import torch
import qmove_core as qmove
from qmove_core.cli.doctor import examine
from tests.nodes.conftest import load_pack
load_pack()
from qmove_pack.nodes.host.panel import state
from qmove_pack.nodes.host.stages import needs, requests
state.outline(), state.snapshot()
assert simcuda.contexts() == [], "the panel"
torch.cuda.set_device({current})
model = torch.nn.Linear(64, 64).to("cuda:{used}")
state.outline()
measurement = needs.begin(None)
needs.taken(measurement)
qmove.park(model)
state.outline(), state.snapshot()
qmove.restore(model)
requests.park_value(model)
requests.restore_value(model)
model(torch.ones(1, 64, device="cuda:{used}"))
qmove.prepare(model), qmove.stats(), qmove.trim()
assert simcuda.contexts() == [{used}], simcuda.contexts()
free = [simcuda.parse_size("4GiB") - torch.cuda.mem_get_info(i)[0] >> 20 for i in ({used},)]
assert free == [300], free  # and what a context takes
print("done")
"""


@pytest.mark.parametrize(("used", "current"), [(0, 0), (1, 0), (1, 1), (0, 1)])
def test_only_the_gpu_of_the_model_is_in_use(used: int, current: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    environment.pop("QMOVE_SIMULATOR", None)
    code = PROGRAM.format(used=used, current=current)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["done"]


def test_an_allocator_without_counters_leaves_the_panel_and_needs_without_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_args: object) -> None:
        raise RuntimeError("CUDAPluggableAllocator does not yet support getDeviceStats")

    torch.zeros(1, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", refuses)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", refuses)
    assert meter.stats_of(torch.device("cuda:0")) == {}
    measurement = needs.begin(needs.Signature("Load"))
    assert needs.taken(measurement)[0][torch.device("cuda:0")] == 0
    state.outline()
    assert state.snapshot()["devices"][0]["total"]
