"""The loaded C++ library: its functions with their types, for the other modules to call."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path

from simcuda.build import SimulationError


class RawNotice(ctypes.Structure):
    """``CopyNotice`` of csrc/sim.h."""

    _fields_ = [
        ("direction", c_int),
        ("device", c_int),
        ("pinned", c_int),
        ("non_blocking", c_int),
        ("nbytes", c_int64),
        ("stream", c_int64),
    ]


NoticeFn = ctypes.CFUNCTYPE(None, ctypes.POINTER(RawNotice), ctypes.POINTER(c_void_p))
DriverFn = ctypes.CFUNCTYPE(None, c_int, c_uint64, ctypes.POINTER(c_void_p))

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "sim_configure": (None, [c_int, c_uint64]),
    "sim_device_count": (c_int, []),
    "sim_set_link": (None, [ctypes.POINTER(c_double)]),
    "sim_set_capacity": (None, [c_int, c_uint64]),
    "sim_capacity": (c_uint64, [c_int]),
    "sim_has_context": (c_int, [c_int]),
    "sim_reset_contexts": (None, [c_uint64]),
    "sim_set_workspaces": (None, [c_uint64]),
    "sim_clear_workspaces": (None, []),
    "sim_counters": (None, [c_int, ctypes.POINTER(c_uint64)]),
    "sim_allocator_counters": (None, [c_int, ctypes.POINTER(c_uint64)]),
    "sim_set_allocator": (c_int, [c_int]),
    "sim_allocator": (c_int, []),
    "sim_set_lost": (c_int, [c_int, c_int]),
    "sim_set_capturing": (c_int, [c_int]),
    "sim_is_capturing": (c_int, []),
    "sim_host_counters": (None, [ctypes.POINTER(c_uint64)]),
    "sim_reset_counters": (None, []),
    "sim_set_pinned_limit": (None, [c_uint64]),
    "sim_set_strict_host_frees": (c_int, [c_int]),
    "sim_peek_last_error": (c_int, []),
    "sim_set_last_error": (None, [c_int]),
    "sim_error_name": (c_char_p, [c_int]),
    "sim_error_string": (c_char_p, [c_int]),
    "sim_add_fault": (
        c_int64,
        [c_int, c_int64, c_int64, c_int64, c_int, c_int, c_void_p, c_void_p, c_char_p, c_int64],
    ),
    "sim_fault_fired": (c_int64, [c_int64]),
    "sim_remove_fault": (None, [c_int64]),
    "sim_on_copy": (None, [NoticeFn]),
    "sim_on_driver_call": (None, [DriverFn]),
    "sim_driver_counters": (None, [c_int, ctypes.POINTER(c_double)]),
    "sim_now": (c_double, []),
    "sim_advance": (None, [c_double]),
    "sim_reset_clock": (None, []),
    "sim_compute": (None, [c_int, c_int64, c_double]),
    "sim_stream_ready": (c_double, [c_int, c_int64]),
    "sim_queued": (c_int64, [c_int, c_int64]),
}

_loaded: ctypes.CDLL | None = None


def load(path: Path, torch: Path) -> ctypes.CDLL:
    """Loads torch's CPU libraries and then this one, before ``import torch`` asks whether there is
    a CUDA device."""
    global _loaded
    libraries = torch / "lib"
    first = sorted(libraries.glob("libgomp*")) + [
        libraries / "libc10.so",
        libraries / "libtorch_cpu.so",
    ]
    for library in first:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    _loaded = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(_loaded, name)
        function.restype, function.argtypes = result, arguments
    return _loaded


def sim() -> ctypes.CDLL:
    """The loaded library; raises SimulationError before ``simcuda.activate()``."""
    if _loaded is None:
        raise SimulationError(
            "the simulated devices are not active: call simcuda.activate() before `import torch`"
        )
    return _loaded


def is_loaded() -> bool:
    return _loaded is not None
