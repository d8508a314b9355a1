"""The Python side of a CUDA build: what ``torch._C`` has there and a CPU build lacks.

``torch.cuda``'s own Python code runs as it is. It finds its ``torch._C._cuda_*`` functions here;
most of them are the device-neutral functions of ``torch.accelerator``, which reach the C++ side by
themselves. Written for torch 2.13; a name that a later version asks for and that is missing here
shows as an AttributeError naming it.
"""

from __future__ import annotations

import ctypes
import types
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch._utils import _dummy_type

from simcuda import storages
from simcuda.counters import integrated
from simcuda.library import sim

CAPABILITY = (8, 9)
ASYNC = 3  # kAsync of csrc/sim.h
CUDA_TYPE = 1  # c10::DeviceType::CUDA
CUDA_VERSION = "12.8"  # what programs that tell CUDA from ROCm look for in torch.version.cuda


@dataclass(frozen=True)
class DeviceProperties:
    """``torch._C._CudaDeviceProperties`` of a simulated device; the sizes of its chip are an Ada
    card's."""

    index: int
    total_memory: int
    name: str = "Simulated CUDA device (simcuda)"
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    multi_processor_count: int = 128
    max_threads_per_multi_processor: int = 1536
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 101376
    shared_memory_per_multiprocessor: int = 102400
    L2_cache_size: int = 72 << 20
    is_multi_gpu_board: int = 0
    pci_bus_id: int = 0
    pci_domain_id: int = 0

    @property
    def is_integrated(self) -> int:
        return int(self.index in integrated)

    @property
    def pci_device_id(self) -> int:
        return self.index

    @property
    def gcnArchName(self) -> str:
        return self.name  # as in CUDA builds, where AMD's property repeats the name

    @property
    def uuid(self) -> str:
        return f"00000000-0000-0000-0000-{self.index:012d}"


def device_properties(index: int) -> DeviceProperties:
    """What ``torch.cuda.get_device_properties`` returns."""
    return DeviceProperties(index=index, total_memory=sim().sim_capacity(index))


class cudaError(IntEnum):
    """The runtime's error codes that can occur here, by their CUDA names."""

    success = 0
    invalidValue = 1
    memoryAllocation = 2
    hostMemoryAlreadyRegistered = 712
    hostMemoryNotRegistered = 713
    notSupported = 801
    streamCaptureUnsupported = 900
    unknown = 999


def _host_register(ptr: int, nbytes: int, flags: int) -> cudaError:
    """Page-locks host memory.

    As in CUDA a failure returns its code, and leaves it for the next operator of this thread to
    raise, and once more for the next wait for the device (Comfy-Org/ComfyUI#10738).
    """
    return cudaError(torch.ops.simcuda.host_register(ptr, nbytes, flags))


def _host_unregister(ptr: int) -> cudaError:
    """Unlocks memory that was registered at exactly this address."""
    return cudaError(torch.ops.simcuda.host_unregister(ptr))


def _clear_workspaces() -> None:
    sim().sim_clear_workspaces()  # as it is, TorchDynamo could not hash it


def _is_capturing() -> bool:
    return bool(sim().sim_is_capturing())


def _allocator_backend() -> str:
    return "cudaMallocAsync" if sim().sim_allocator() == ASYNC else "native"


def _mem_get_info(device: int) -> tuple[int, int]:
    return torch._C._accelerator_getMemoryInfo(device)


def _make_cudart() -> types.ModuleType:
    """``torch.cuda.cudart()``: the functions that PyTorch's own binding has, and no more (no
    cudaGetLastError)."""
    module = types.ModuleType("torch._C._cudart", "The simulated CUDA runtime.")
    functions: dict[str, Any] = {
        "cudaError": cudaError,
        "cudaGetErrorString": lambda code: sim().sim_error_string(int(code)).decode(),
        "cudaHostRegister": _host_register,
        "cudaHostUnregister": _host_unregister,
        "cudaMemGetInfo": _mem_get_info,
        "cudaProfilerStart": lambda: cudaError.success,
        "cudaProfilerStop": lambda: cudaError.success,
    }
    for name, value in functions.items():
        setattr(module, name, value)
    return module


class _CudaStreamBase(torch._C.Stream):
    """What ``torch.cuda.Stream`` derives from."""

    def __new__(
        cls,
        priority: int = 0,
        stream_id: int | None = None,
        device_index: int = 0,
        device_type: int = CUDA_TYPE,
        stream_ptr: int = 0,
    ) -> _CudaStreamBase:
        if stream_ptr:
            raise NotImplementedError("simcuda has no external streams")
        if stream_id is not None:
            return super().__new__(
                cls, stream_id=stream_id, device_index=device_index, device_type=device_type
            )
        device = torch.device("cuda", torch._C._accelerator_getDeviceIndex())
        return super().__new__(cls, device, priority=priority)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, -1)


class _CudaEventBase(torch._C.Event):
    """What ``torch.cuda.Event`` derives from."""

    def __new__(
        cls,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> _CudaEventBase:
        device = torch.device("cuda", torch._C._accelerator_getDeviceIndex())
        return super().__new__(
            cls, device, enable_timing=enable_timing, blocking=blocking, interprocess=interprocess
        )

    @property
    def cuda_event(self) -> int:
        return self.event_id

    def elapsed_time(self, end_event: torch.Event) -> float:
        """Virtual milliseconds; torch.Event's own refuses subclasses of itself as ``end_event``."""
        if not (self.event_id and end_event.event_id):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return torch.ops.simcuda.elapsed_milliseconds(self.event_id, end_event.event_id)


def _stream_data(device: int, stream_id: int) -> tuple[int, int, int]:
    return stream_id, device, CUDA_TYPE


def _current_stream(device: int) -> tuple[int, int, int]:
    return _stream_data(device, torch._C._accelerator_getStream(device).stream_id)


def _set_stream(stream_id: int, device_index: int, device_type: int) -> None:
    """Makes a stream current, and its device with it."""
    torch._C._accelerator_setDeviceIndex(device_index)
    stream = torch._C.Stream(
        stream_id=stream_id, device_index=device_index, device_type=device_type
    )
    torch._C._accelerator_setStream(stream)


def _init() -> None:
    """``torch._C._cuda_init``: what torch.cuda expects to find after its first use."""
    torch.ops.simcuda.initialize()  # until then at::is_pinned answers False for everything
    count = sim().sim_device_count()
    torch.cuda.default_generators = tuple(
        torch.ops.simcuda.seed_source(index) for index in range(count)
    )
    torch.cuda.__dict__["_get_device_properties"] = device_properties


def _synchronize() -> None:
    torch._C._accelerator_synchronizeDevice(torch._C._accelerator_getDeviceIndex())


def _host_memory_stats() -> dict[str, Any]:
    """Pinned memory as ``torch.cuda.host_memory_stats`` nests it."""
    values = (ctypes.c_uint64 * 5)()
    sim().sim_host_counters(values)
    pinned, peak, pins, registered, _ = values
    pinned -= registered  # that is not its allocator's
    stat = {"current": pinned, "peak": peak, "allocated": peak, "freed": peak - pinned}
    return {"allocated_bytes": stat, "active_bytes": stat, "num_host_alloc": pins}


def _is_in_bad_fork() -> bool:
    return False


def install_bindings() -> None:
    """Puts the functions of a CUDA build into ``torch._C``; before ``torch.cuda`` is imported."""
    c = torch._C
    bindings: dict[str, Any] = {
        "_has_cuda": True,
        "_cudart": _make_cudart(),
        "_CudaDeviceProperties": DeviceProperties,
        "_CudaStreamBase": _CudaStreamBase,
        "_CudaEventBase": _CudaEventBase,
        "_CUDAGraph": _dummy_type("_CUDAGraph"),
        "_graph_pool_handle": _dummy_type("_graph_pool_handle"),
        "_cuda_isCurrentStreamCapturing": _is_capturing,
        "_cuda_init": _init,
        "_cuda_isInBadFork": _is_in_bad_fork,
        "_cuda_getDeviceCount": lambda: int(
            sim().sim_device_count()
        ),  # torch._dynamo hashes it, which ctypes refuses
        "_cuda_hasPrimaryContext": lambda index: bool(sim().sim_has_context(index)),
        "_cuda_getDevice": c._accelerator_getDeviceIndex,
        "_cuda_setDevice": c._accelerator_setDeviceIndex,
        "_cuda_exchangeDevice": c._accelerator_exchangeDevice,
        "_cuda_maybeExchangeDevice": c._accelerator_maybeExchangeDevice,
        "_cuda_canDeviceAccessPeer": lambda device, peer: device != peer,
        "_cuda_getArchFlags": lambda: f"sm_{CAPABILITY[0]}{CAPABILITY[1]}",
        "_cuda_getDriverVersion": lambda: 12080,
        "_cuda_getCompiledVersion": lambda: 12080,
        "_cuda_synchronize": _synchronize,
        "_cuda_ipc_collect": lambda: None,
        "_cuda_sleep": lambda cycles: torch.ops.simcuda.sleep(cycles),
        "_cuda_getCurrentStream": _current_stream,
        "_cuda_getCurrentRawStream": lambda device: _current_stream(device)[0],
        "_cuda_getDefaultStream": lambda device: _stream_data(device, 0),
        "_cuda_setStream": _set_stream,
        "_cuda_memoryStats": c._accelerator_getDeviceStats,
        "_cuda_resetPeakMemoryStats": c._accelerator_resetPeakStats,
        "_cuda_resetAccumulatedMemoryStats": c._accelerator_resetAccumulatedStats,
        "_cuda_hostMemoryStats": _host_memory_stats,
        "_cuda_emptyCache": c._accelerator_emptyCache,
        "_cuda_clearCublasWorkspaces": _clear_workspaces,
        "_cuda_memorySnapshot": lambda *_: {"segments": [], "device_traces": []},
        "_cuda_getAllocatorBackend": _allocator_backend,
        "_cuda_set_sync_debug_mode": lambda mode: None,
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_lock_mutex": lambda: None,
        "_cuda_unlock_mutex": lambda: None,
    }
    for name, value in bindings.items():
        setattr(c, name, value)


def finish() -> None:
    """Sets what can only be set once torch is imported."""
    torch.cuda._device_count_nvml = lambda: -1  # NVML would count the real cards of this machine
    torch.version.cuda = CUDA_VERSION
    storages.install()
