"""On what the figures were measured: the machine, the versions, the date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import psutil
import torch

import simcuda

PACKAGES = (
    "qmove",
    "torch",
    "bitsandbytes",
    "accelerate",
    "diffusers",
    "mmgp",
    "safetensors",
    "numpy",
)


def describe(device: str) -> dict[str, object]:
    """`device`: what the GPU is called."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "ram_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "device": device,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def has_gpu_build() -> bool:
    """Whether this torch is a build for a GPU; where it is not, the simulated one serves."""
    return not simcuda.is_active() and (
        torch.version.cuda is not None or torch.version.hip is not None
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), ""
    )
    return named or platform.processor()
