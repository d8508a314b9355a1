"""Simulated CUDA devices on a CPU build of PyTorch.

    import simcuda
    simcuda.activate(devices=2, memory="4GiB")   # before the first `import torch`
    import torch
    x = torch.ones(4, device="cuda:1")

or, for a program that knows nothing of it: ``python -m simcuda --devices 2 -m module arguments...``

Unless ``set_allocator`` says otherwise sizes are counted to the byte and nothing is cached:
``torch.cuda.memory_reserved`` equals ``memory_allocated``, and ``empty_cache`` has nothing to
return. See README.md for what is modelled and what is not.
"""

from __future__ import annotations

from simcuda import clock, link
from simcuda.activation import activate, is_active
from simcuda.build import SimulationError
from simcuda.counters import (
    AllocatorCounters,
    Counters,
    HostCounters,
    allocator_counters,
    capturing,
    contexts,
    counters,
    host_counters,
    last_error,
    lost_context,
    parse_size,
    queued,
    reset_contexts,
    reset_counters,
    set_allocator,
    set_integrated,
    set_memory,
    set_pinned_limit,
    set_workspaces,
    strict_host_frees,
)
from simcuda.driver import DriverCall, DriverCounters, driver_counters, on_driver_call
from simcuda.faults import CopyNotice, Fault, fail, flip_bit, on_copy
from simcuda.hostile import hostile

__all__ = [
    "AllocatorCounters",
    "CopyNotice",
    "Counters",
    "DriverCall",
    "DriverCounters",
    "Fault",
    "HostCounters",
    "SimulationError",
    "activate",
    "allocator_counters",
    "capturing",
    "clock",
    "contexts",
    "counters",
    "driver_counters",
    "fail",
    "flip_bit",
    "host_counters",
    "hostile",
    "is_active",
    "last_error",
    "link",
    "lost_context",
    "on_copy",
    "on_driver_call",
    "parse_size",
    "queued",
    "reset_contexts",
    "reset_counters",
    "set_allocator",
    "set_integrated",
    "set_memory",
    "set_pinned_limit",
    "set_workspaces",
    "strict_host_frees",
]
