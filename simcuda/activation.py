"""Brings the simulated devices up: build, load before torch, `import torch`, and finish its Python
side."""

from __future__ import annotations

import sys

from simcuda import build, imports, library, link
from simcuda.build import SimulationError
from simcuda.counters import parse_size

MAX_DEVICES = 16  # kMaxDevices of csrc/sim.h

_active = False


def is_active() -> bool:
    """Whether this process has simulated devices."""
    return _active


def activate(devices: int = 1, memory: str | int = "4GiB") -> None:
    """Gives this process simulated CUDA devices, and imports torch.

    It has to come first: PyTorch asks whether there is a CUDA device once, while it is imported.

    Args:
        devices: how many, 1 to 16.
        memory: each device's capacity in bytes, or as "4GiB".

    Raises:
        SimulationError: torch is imported already or is a CUDA build, this is not Linux, or there
            is no C++ compiler.
        ValueError: the arguments make no machine.
    """
    global _active
    if _active:
        raise SimulationError(
            "the simulated devices are active already; their capacity: simcuda.set_memory()"
        )
    if not 1 <= devices <= MAX_DEVICES:
        raise ValueError(f"devices must be 1 to {MAX_DEVICES}, not {devices}")
    capacity = parse_size(memory)
    if "torch" in sys.modules:
        raise SimulationError(
            "torch is imported already, and it asks for CUDA devices only while it is imported: call "
            "simcuda.activate() before the first `import torch`, or run the program with `python -m simcuda`"
        )
    torch_folder = build.torch_folder()
    build.check_platform(torch_folder)
    library.load(build.build(), torch_folder).sim_configure(devices, capacity)
    link.use(link.current())
    imports.install()

    import torch  # noqa: F401

    from simcuda import torch_cuda

    torch_cuda.finish()
    _active = True
