"""Old releases of PyTorch: what they lack is taken away here, and every name of PyTorch's that our
code uses is looked up in what they have.

`torch_releases.json` was read from the sources and stubs in the releases' own wheels
(`tools/torch_names.py`). The cases that run, run in a process of their own: names are taken away
before anything of qmove is imported.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from types import ModuleType

import pytest
import torch

import qmove_core
from tools import torch_names
from tools.torch_names import Release, Use

pytestmark = pytest.mark.simulated
ROOT = Path(qmove_core.__file__).parent.parent
FOUND = json.loads(torch_names.TABLE.read_text(encoding="utf-8"))
RELEASES = list(FOUND["sources"])
NAMES = FOUND["names"]
AGAIN = "read it anew: python -m tools.torch_names WHEELS (see the file's docstring)"


def of_release(name: str, release: str) -> list[list[str]] | None:
    """What a name takes there, if it is a function; None where it is not there. KeyError where that
    is not known."""
    if name in NAMES:
        found: list[list[str]] | None = NAMES[name][release]
        return found
    for namespace in torch_names.PUBLIC:
        first = name.removeprefix(f"{namespace}.").split(".")[0]
        if name.startswith(f"{namespace}.") and is_there(f"{namespace}.{first}"):
            if first in FOUND["later"][namespace][release]:
                return None
            found_here = reduce(getattr, f"{namespace}.{first}".split(".")[1:], torch)
            if not first.startswith("_") and not isinstance(found_here, ModuleType):
                return []
    raise KeyError(name)


def is_known(name: str) -> bool:
    try:
        of_release(name, RELEASES[0])
    except KeyError:
        return False
    return True


def missing(uses: list[Use], release: str) -> list[str]:
    """Where a name is used without a way on, that a release does not have."""
    return [
        f"{use.where}: {use.name}"
        for use in uses
        if not use.is_guarded and of_release(use.name, release) is None
    ]


def refused(uses: list[Use], release: str) -> list[str]:
    """Where a call passes what no overload of a release takes."""
    found = []
    for use in uses:
        overloads = of_release(use.name, release)
        if use.keywords and overloads:
            takes = [set(use.keywords) <= set(each) or "**" in each for each in overloads]
            if not any(takes):
                found.append(f"{use.where}: {use.name}({', '.join(use.keywords)})")
    return found


@pytest.fixture(scope="module")
def uses() -> list[Use]:
    return torch_names.uses()


def test_the_table_knows_every_name_that_our_code_uses(uses: list[Use]) -> None:
    assert len({use.name for use in uses}) > 100
    assert sorted({use.name for use in uses if not is_known(use.name)}) == [], AGAIN


@pytest.mark.parametrize("release", RELEASES)
def test_what_a_release_lacks_is_used_only_where_there_is_a_way_on(
    uses: list[Use], release: str
) -> None:
    assert missing(uses, release) == []
    assert refused(uses, release) == []


PLANTED = {
    "torch.AcceleratorError": ["planted.py:2: torch.AcceleratorError"],
    "torch.cuda.host_memory_stats()": ["planted.py:2: torch.cuda.host_memory_stats"],
    "getattr(torch.cuda, 'host_memory_stats')": ["planted.py:2: torch.cuda.host_memory_stats"],
    "getattr(torch.cuda, 'host_memory_stats', None)": [],
    "hasattr(torch.cuda, 'host_memory_stats') and torch.cuda.host_memory_stats()": [],
    "torch.AcceleratorError if hasattr(torch, 'AcceleratorError') else RuntimeError": [],
    "torch.accelerator.get_memory_info(0)": ["planted.py:2: torch.accelerator.get_memory_info"],
    "torch.int32, torch.Tensor.is_complex, torch.cuda.ipc_collect": [],
    "1 if hasattr(torch, 'AcceleratorError') else torch.AcceleratorError": [
        "planted.py:2: torch.AcceleratorError"
    ],
}


@pytest.mark.parametrize("line", PLANTED)
def test_a_planted_use_of_what_2_6_lacks_is_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_names, "ROOT", tmp_path)
    file = tmp_path / "planted.py"
    file.write_text(f"import torch\n{line}\n")
    assert missing(torch_names.uses([file]), "2.6.0") == PLANTED[line]


def test_a_planted_argument_that_no_release_takes_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_names, "ROOT", tmp_path)
    file = tmp_path / "planted.py"
    file.write_text("import torch\ntorch.empty(1, dtype=torch.uint8, pinned=True)\n")
    found = refused(torch_names.uses([file]), "2.6.0")
    assert found == ["planted.py:2: torch.empty(dtype, pinned)"]


def test_what_is_read_from_sources_is_what_a_running_torch_has() -> None:
    installed = Release(Path(torch.__file__).parent)
    absent = [*NAMES, "torch.warp", "torch.cuda.warp", "torch.Tensor.warp", "torch._C._warp"]
    read = {name: installed.find(name) is not None for name in absent}
    assert read == {name: is_there(name) for name in absent}


def is_there(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        try:
            reduce(getattr, parts[count:], module)
        except AttributeError:
            return False
        return True
    return False


def taken_away(release: str) -> str:
    """Code that takes away what a release lacks of what our code uses."""
    lacking = [name for name, found in NAMES.items() if found[release] is None]
    assert lacking or release != "2.6.0"
    return "\n".join(f"del {name}" for name in lacking)


# Beside that, what only tells in use.
TAKE_AWAY = {
    **{release: taken_away(release) for release in RELEASES},
    "without what is private": """
for name in ("_cuda_hasPrimaryContext", "_cuda_clearCublasWorkspaces"):
    vars(torch._C).pop(name, None)
""",
}
TAKE_AWAY["2.6.0"] += """
original = torch.accelerator.current_accelerator
torch.accelerator.current_accelerator = lambda: original() or refuse()
"""

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
