"""Old releases of PyTorch, as far as qmove can tell them apart: what they lack is taken away here.

What is missing where is in the releases' own stubs (`torch/_C/__init__.pyi`) and notes. Each case
runs in a process of its own: names are taken away before anything of qmove is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import qmove_core

pytestmark = pytest.mark.simulated
ROOT = Path(qmove_core.__file__).parent.parent

# What the running release has and an older one has not. 2.8 is where AcceleratorError came.
TAKE_AWAY = {
    "2.6": """
del torch.AcceleratorError
del torch.cuda.host_memory_stats, torch.cuda.reset_peak_host_memory_stats
del torch.cuda.device_memory_used
for name in ("memory_allocated", "memory_reserved", "empty_cache", "get_memory_info", "Graph"):
    vars(torch.accelerator).pop(name, None)
for name in ("_acceleratorGraph", "_XPUGraph", "_accelerator_isAllocatorInitialized"):
    vars(torch._C).pop(name, None)
original = torch.accelerator.current_accelerator
torch.accelerator.current_accelerator = lambda: original() or refuse()
""",
    "2.8": """
for name in ("Graph", "get_memory_info"):
    vars(torch.accelerator).pop(name, None)
for name in ("_acceleratorGraph", "_XPUGraph"):
    vars(torch._C).pop(name, None)
""",
    "without what is private": """
for name in ("_cuda_hasPrimaryContext", "_cuda_clearCublasWorkspaces"):
    vars(torch._C).pop(name, None)
""",
    "newest": "",
}

PREPARED = """
import simcuda
if {with_gpu}:
    simcuda.activate(devices=2, memory="1GiB")
import torch, importlib, pkgutil

def refuse():
    raise RuntimeError("Please register an accelerator")

assert torch.accelerator.is_available() == {with_gpu}
torch.accelerator.is_available = lambda: {with_gpu}  # it asks for the current one, in newer ones
{take_away}
import qmove_core as qmove
for found in pkgutil.walk_packages(qmove.__path__, "qmove_core."):
    if not found.name.endswith("__main__"):
        importlib.import_module(found.name)
from qmove_core.cli.doctor import examine
from torch import nn
"""

WITH_A_GPU = (
    PREPARED
    + """
def model(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)).to("cuda:1")

first, second, x = model(0), model(1), torch.ones(2, 64, device="cuda:1")
with torch.no_grad():
    expected = [first(x).cpu(), second(x).cpu()]
    assert qmove.park(first).reserved_after is not None
    assert qmove.restore(first).stragglers == []
    qmove.park(first)
    qmove.restore(first, stream=True)
    assert torch.equal(first(x).cpu(), expected[0])
    qmove.park(first)
    gone, come = qmove.swap(second, first)
    assert qmove.is_parked(second) and not qmove.is_parked(first)
    assert torch.equal(first(x).cpu(), expected[0])
    assert torch.equal(second(x).cpu(), expected[1])  # it wakes
    qmove.move(first, "cpu")
    qmove.move(first, "cuda:1")
    qmove.configure(verify=True)
    assert qmove.park(first).verified
    assert qmove.restore(first).verified
    assert torch.equal(first(x).cpu(), expected[0])
    with simcuda.fail("alloc", times=9):
        try:
            qmove.move(first, "cuda:0")
        except qmove.NotEnoughMemory:
            print("refused")
assert [device.name for device in examine().devices] == ["cuda:0", "cuda:1"]
qmove.stats(), qmove.trim()
print("done")
"""
)

WITHOUT = (
    PREPARED
    + """
model = nn.Linear(4, 4)
assert qmove.park(model).copied_bytes == 0
assert qmove.restore(model).copied_bytes == 0
assert qmove.move(model, "cpu").copied_bytes == 0
assert qmove.prepare(model) == 0
assert examine().devices == []
try:
    qmove.move(model, "cuda")
except qmove.UnknownDevice:
    print("done")
"""
)


def run(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("release", TAKE_AWAY)
def test_every_module_loads_and_models_move(release: str) -> None:
    said = run(WITH_A_GPU.format(with_gpu=True, take_away=TAKE_AWAY[release]))
    assert said.split() == ["refused", "done"]


@pytest.mark.parametrize("release", TAKE_AWAY)
def test_every_module_loads_on_a_machine_without_an_accelerator(release: str) -> None:
    assert run(WITHOUT.format(with_gpu=False, take_away=TAKE_AWAY[release])).split() == ["done"]
