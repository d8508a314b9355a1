"""The one place where tests get their device: a real GPU if there is one, else simulated ones."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import simcuda


def _torch_is_a_cpu_build() -> bool:
    """Looked up without importing torch: the simulator has to come first."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed: run `make test`, which sets it up"
    return "cuda: Optional[str] = None" in (Path(spec.origin).parent / "version.py").read_text()


# Threads that wait without spinning: where other programs run too, PyTorch's CPU kernels are many times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if _torch_is_a_cpu_build() and not simcuda.is_active():
    # Without CUDA kernels bitsandbytes compiles its own for each shape, which takes minutes; uncompiled they do as well.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    simcuda.activate(devices=2, memory="4GiB")

import torch  # noqa: E402

SIMULATED = simcuda.is_active()
if not SIMULATED and not torch.cuda.is_available():
    pytest.exit(
        "This torch is a CUDA build, but there is no GPU. Run `make test`: it sets up a CPU build, for the simulated GPU.",
        returncode=2,
    )


@dataclass(frozen=True)
class GPU:
    """What a test asks of the device; the same on a simulated and on a real one.

    Attributes:
        before: bytes that lay there before the test, such as tables that bitsandbytes keeps for the whole process.
    """

    device: torch.device
    before: int

    def allocated(self) -> int:
        """Bytes of live tensors that the test has on the device."""
        gc.collect()
        return torch.cuda.memory_allocated(self.device) - self.before

    def peak(self) -> int:
        """The most bytes the test had there since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) - self.before

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)


@pytest.fixture
def gpu() -> GPU:
    return _gpu(0)


@pytest.fixture
def second_gpu() -> GPU:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return _gpu(1)


def _gpu(index: int) -> GPU:
    gc.collect()
    return GPU(torch.device("cuda", index), torch.cuda.memory_allocated(index))


_modules_set_aside = 0


def _set_imports_aside() -> None:
    """Imported libraries are a million objects that are never garbage: frozen, they cost `gc.collect` no second each time."""
    global _modules_set_aside
    if len(sys.modules) != _modules_set_aside:
        gc.collect()
        gc.freeze()
        _modules_set_aside = len(sys.modules)


@pytest.fixture(autouse=True)
def _no_test_leaves_anything_behind() -> Iterator[None]:
    """Each test starts with empty devices of 4 GiB, fresh counters, qmove's own settings and no host memory kept by it."""
    import qmove_core as qmove
    from qmove_core import arena, arrival

    arena.LOOK_SECONDS = 3600.0  # nothing is given back behind a test's back
    _set_imports_aside()
    yield
    arrival.settle()
    gc.collect()
    qmove.configure(ram_limit=None, keep_mirrors=True, verify=False, pin_limit=None)
    qmove.trim()
    if SIMULATED:
        for index in range(2):
            simcuda.set_memory("4GiB", device=index)
        simcuda.reset_counters()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "simulated: needs the simulated GPU (faults, exact counters)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if SIMULATED:
        return
    for item in items:
        if item.get_closest_marker("simulated") or "simcuda" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="runs on the simulated GPU only; this machine has a real one"))


def pytest_report_header() -> str:
    where = "simulated GPUs (2 x 4 GiB)" if SIMULATED else torch.cuda.get_device_name()
    return f"qmove: tests run on {where}, torch {torch.__version__}"
