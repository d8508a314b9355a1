"""The device that tests run on: a real GPU if there is one, else simulated ones.

Import it before torch.
"""

from __future__ import annotations

import gc
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

import simcuda


def _torch_is_a_cpu_build() -> bool:
    """Looked up without importing torch: the simulator has to come first."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, (
        "torch is not installed: run `make test`, which sets it up"
    )
    return "cuda: Optional[str] = None" in (Path(spec.origin).parent / "version.py").read_text()


# Threads that wait without spinning: where other programs run too, PyTorch's CPU kernels are many
# times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if _torch_is_a_cpu_build() and not simcuda.is_active():
    # Without CUDA kernels bitsandbytes compiles its own for each shape, which takes minutes;
    # uncompiled they do as well.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    simcuda.activate(devices=2, memory="4GiB")

import torch  # noqa: E402

SIMULATED = simcuda.is_active()
if not SIMULATED and not torch.cuda.is_available():
    pytest.exit(
        "This torch is a CUDA build, but there is no GPU. Run `make test`: it sets up a CPU build, for the simulated GPU.",
        returncode=2,
    )


def requested_bytes(device: torch.device) -> int:
    """What tensors asked for, without what the allocator rounds it to, and without the workspaces
    that products of the test itself have made for cuBLAS."""
    torch._C._cuda_clearCublasWorkspaces()
    return int(torch.cuda.memory_stats(device).get("requested_bytes.all.current", 0))


# QMOVE_SIMULATOR=hostile: everything that real cards do and the simulator leaves out by default.
# Behind a comma the allocator: native, if nothing is said, expandable or async.
_mode, _, _allocator = os.environ.get("QMOVE_SIMULATOR", "").partition(",")
if _mode not in ("", "hostile"):
    pytest.exit(f"QMOVE_SIMULATOR={_mode} is unknown; there is: hostile.", returncode=2)
HOSTILE = _mode == "hostile" and SIMULATED


def hostile() -> AbstractContextManager[None]:
    """Everything hostile at once, for one test."""
    return simcuda.hostile(_allocator or "native") if HOSTILE else nullcontext()


@dataclass(frozen=True)
class GPU:
    """What a test asks of the device; the same on a simulated and on a real one.

    Attributes:
        before: bytes that lay there before the test, such as tables that bitsandbytes keeps for the
            whole process.
    """

    device: torch.device
    before: int

    def allocated(self) -> int:
        """Bytes of live tensors that the test has on the device."""
        gc.collect()
        return requested_bytes(self.device) - self.before

    def peak(self) -> int:
        """The most bytes the test had there since `reset_peak`."""
        stats = torch.cuda.memory_stats(self.device)
        return int(stats["requested_bytes.all.peak"]) - self.before

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)
