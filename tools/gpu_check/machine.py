"""The machine under test: what it is, and how large the steps may make their models."""

from __future__ import annotations

import ctypes
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from qmove_core import nvml

MIB = 1 << 20
# cudaDeviceAttr numbers, from the CUDA runtime API's documentation.
ATTRIBUTES = {
    "pageable memory access": 88,
    "pageable access by the host's page tables": 100,
    "read-only registration": 113,
}


@dataclass(frozen=True)
class Sizes:
    """How large the steps may be. Bytes, and counts.

    Attributes:
        model: one model.
        pins: host memory that the pin step locks in all.
        many: how many small tensors the model of many has.
        rounds: rounds of the race step.
    """

    model: int
    pins: int
    many: int
    rounds: int

    @classmethod
    def of_this_machine(cls, simulated: bool) -> Sizes:
        """A third of the VRAM, a quarter of the free RAM, 8 GB at most; far less when simulated."""
        if simulated:
            return cls(model=24 * MIB, pins=64 * MIB, many=200, rounds=5)
        total = torch.cuda.get_device_properties(0).total_memory
        available = psutil.virtual_memory().available
        return cls(
            model=min(8_000_000_000, total // 3, available // 4),
            pins=min(8_000_000_000, available // 4),
            many=10_000,
            rounds=200,
        )

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def is_simulated() -> bool:
    return torch.cuda.is_available() and "simcuda" in torch.cuda.get_device_name(0)


def facts() -> dict[str, Any]:
    """What a reader of the report wants to know of the machine."""
    properties = torch.cuda.get_device_properties(0)
    memory = psutil.virtual_memory()
    found: dict[str, Any] = {
        "card": properties.name,
        "cards": torch.cuda.device_count(),
        "compute capability": f"{properties.major}.{properties.minor}",
        "VRAM in GiB": round(properties.total_memory / 2**30, 2),
        "shares its memory with the CPU": bool(getattr(properties, "is_integrated", 0)),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or f"HIP {torch.version.hip}",
        "allocator": torch.cuda.get_allocator_backend(),
        "system": platform.platform(),
        "WSL": sys.platform == "linux" and "microsoft" in platform.release().lower(),
        "python": platform.python_version(),
        "cores": psutil.cpu_count(logical=True),
        "RAM in GiB": round(memory.total / 2**30, 1),
        "free RAM in GiB": round(memory.available / 2**30, 1),
    }
    if sys.platform == "linux":
        folder = Path("/sys/kernel/mm/transparent_hugepage")
        for name in ("enabled", "defrag"):
            if (folder / name).exists():
                found[f"huge pages, {name}"] = (folder / name).read_text().strip()
        found["NUMA nodes"] = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    runtime = cuda_runtime()
    for name, number in ATTRIBUTES.items():
        found[name] = "unknown" if runtime is None else _attribute(runtime, number)
    return found


def cuda_runtime() -> ctypes.CDLL | None:
    """The CUDA runtime library that PyTorch has loaded; None where it cannot be found."""
    for mapped in psutil.Process().memory_maps() if not is_simulated() else ():
        name = Path(mapped.path).name
        if name.startswith(("libcudart", "cudart64", "libamdhip64")):
            return ctypes.CDLL(mapped.path)
    return None


def _attribute(runtime: ctypes.CDLL, number: int) -> int | str:
    value = ctypes.c_int()
    if not hasattr(runtime, "cudaDeviceGetAttribute"):  # HIP has other numbers
        return "unknown"
    code = runtime.cudaDeviceGetAttribute(ctypes.byref(value), number, 0)
    return value.value if code == 0 else f"error {code}"


def settled_bytes(device: int = 0) -> int:
    """Bytes of live tensors on the device, once all that is queued is done."""
    import gc

    gc.collect()
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def free_seen_by_others(device: int = 0) -> int | None:
    """Bytes free on the card as another process sees them (NVML); None without NVML."""
    memory = nvml.memory(torch.device("cuda", device))
    return None if memory is None else memory.free
