"""The devices of this machine: a small layer over `torch.accelerator` and `torch.<device type>`."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from . import nvml
from .errors import UnknownDevice, may_spoil_the_device

log = logging.getLogger("qmove")

CPU = torch.device("cpu")

Device = str | int | torch.device
DeviceMap = Mapping[str, Device]


def accelerator() -> torch.device | None:
    """The type of accelerator that PyTorch works with, without an index; None without one."""
    try:
        found = torch.accelerator.current_accelerator()
    except RuntimeError:  # torch 2.6 raises where there is none; 2.7 returns None
        return None
    # A build for CUDA names it also where there is no driver.
    return found if found is not None and torch.accelerator.device_count() else None


def resolve(device: Device) -> torch.device:
    """The device with its index, checked to exist.

    "cuda" is the current CUDA device, 1 the accelerator's second one.

    Raises:
        UnknownDevice: it cannot be parsed, or the machine has no such device.
    """
    current = accelerator()
    if isinstance(device, int):
        if current is None:
            raise UnknownDevice(
                f"Device {device} was asked for, but this machine has no accelerator, only the CPU."
            )
        device = f"{current.type}:{device}"
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnknownDevice(
            f"{device!r} is not a device. This machine has: {', '.join(known())}."
        ) from error
    if parsed.type == "cpu":
        return CPU
    if parsed.type == "meta":
        raise UnknownDevice(
            "A move to the meta device would lose the data. To free VRAM use qmove.park(model)."
        )
    if parsed.index is None:
        is_current = current is not None and current.type == parsed.type
        index = torch.accelerator.current_device_index() if is_current else 0
        parsed = torch.device(parsed.type, index)
    if str(parsed) not in known():
        raise UnknownDevice(f"There is no {parsed} on this machine. It has: {', '.join(known())}.")
    return parsed


def placement(target: Device | DeviceMap) -> Callable[[str], torch.device | None]:
    """Returns a function from a name to a device: `target`, or what a device_map has for it.

    In a device_map the longest prefix of the name decides; "" is a prefix of every name. None where
    none fits.

    Raises:
        UnknownDevice: as `resolve`.
    """
    if not isinstance(target, Mapping):
        device = resolve(target)
        return lambda name: device
    places = {prefix: resolve(value) for prefix, value in target.items()}

    def by_longest_prefix(name: str) -> torch.device | None:
        fitting = [prefix for prefix in places if not prefix or f"{name}.".startswith(f"{prefix}.")]
        return places[max(fitting, key=len)] if fitting else None

    return by_longest_prefix


def known() -> list[str]:
    """Names of all devices a tensor can live on here, the CPU first."""
    current = accelerator()
    count = torch.accelerator.device_count() if current is not None else 0
    return ["cpu", *(f"{current.type}:{i}" for i in range(count))]  # type: ignore[union-attr]


def has_context(device: torch.device) -> bool:
    """Whether this process uses `device` already; True where the backend cannot tell.

    A first call on another one would make a driver's context there: 300 to 850 MB of VRAM.
    """
    if device.type != "cuda" or not hasattr(torch._C, "_cuda_hasPrimaryContext"):
        return True
    return torch._C._cuda_hasPrimaryContext(device.index or 0)


def memory_without_context(device: torch.device) -> nvml.Memory | None:
    """Bytes free and in all, without making a context on `device`; None where nobody can tell."""
    module = torch.get_device_module(device)
    if has_context(device) and hasattr(module, "mem_get_info"):
        try:
            return nvml.Memory(*module.mem_get_info(device))
        except RuntimeError as error:  # XPU on several systems
            log.debug("%s does not say what is free: %s", device, str(error))
    return nvml.memory(device)


def total_memory(device: torch.device) -> int | None:
    """Bytes of the whole device, without making a context there; None where it is not reported."""
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):
        return None
    return int(module.get_device_properties(device).total_memory)


def shares_memory_with_host(device: torch.device) -> bool:
    """Whether its VRAM is the machine's RAM (GB10, Strix Halo, Jetson, Apple's chips).

    Parking gains nothing there: for a while the bytes are there twice, and afterwards as before.
    """
    if device.type != "cuda":
        return device.type == "mps"
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", 0))


def is_capturing() -> bool:
    """Whether what this thread queues on an accelerator now becomes a part of a graph."""
    current = accelerator()
    if current is None:
        return False
    module = torch.get_device_module(current)
    if not hasattr(module, "is_current_stream_capturing"):
        return False
    # Who has no context on the current device captures nothing there, and asking would make one.
    here = torch.device(current.type, torch.accelerator.current_device_index())
    return has_context(here) and bool(module.is_current_stream_capturing())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` now; what PyTorch's allocator holds unused counts.

    None where the backend does not report it (mps, some XPU systems, pluggable allocators): then
    the allocation shows it.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    try:
        free, _total = module.mem_get_info(device)
        unused = module.memory_reserved(device) - module.memory_allocated(device)
    except RuntimeError as error:  # XPU on several systems, pluggable allocators
        log.debug("%s does not say what is free: %s", device, str(error))
        return None
    return free + unused


def unreturned(devices: Iterable[torch.device]) -> int:
    """Bytes that PyTorch's allocator holds unused on these devices: beside what is in use they
    share segments with it, and no other program can have them. 0 where it does not say."""
    nbytes = 0
    for device in devices:
        module = torch.get_device_module(device)
        if device.type != "cpu" and hasattr(module, "memory_reserved"):
            try:
                nbytes += module.memory_reserved(device) - module.memory_allocated(device)
            except RuntimeError as error:  # pluggable allocators
                log.debug("%s does not say what it holds: %s", device, str(error))
    return nbytes


def lost(error: BaseException, devices: Iterable[torch.device]) -> torch.device | None:
    """The device that can be used no more after this error; None where it was only this call."""
    if may_spoil_the_device(error):
        for device in devices:
            try:
                synchronize([device])
            except RuntimeError as again:
                log.debug("%s is lost: %s", device, str(again))
                return device
    return None


def synchronize(devices: Iterable[torch.device]) -> None:
    """Waits until all work queued on these devices is done: their bytes can be read or freed."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


class _Unstreamed:
    """In place of a stream where the backend has none: one can only wait for all work at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def synchronize(self) -> None:
        torch.accelerator.synchronize(self._device)

    def record_event(self) -> _Unstreamed:
        return self

    def wait_event(self, _event: _Unstreamed) -> None:
        pass


@functools.cache
def own_stream(device: torch.device, purpose: str) -> Any:
    """qmove's own stream for one purpose ("in", "out", "digest"), beside that of the model."""
    module = torch.get_device_module(device)
    return module.Stream(device=device) if has_streams(device) else _Unstreamed(device)


def has_streams(device: torch.device) -> bool:
    """Whether copies to and from `device` can run beside what the model computes."""
    return hasattr(torch.get_device_module(device), "Stream")


def on_stream(stream: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this thread queues its work for `device` on `stream`."""
    if isinstance(stream, _Unstreamed):
        return nullcontext()
    return torch.get_device_module(device).stream(stream)  # type: ignore[no-any-return]


def wait_for_work(stream: Any, device: torch.device) -> None:
    """Makes `stream` wait for what this thread and the default stream have queued until now.

    The host does not wait.
    """
    if isinstance(stream, _Unstreamed):
        return
    wait_for_own_work(stream, device)
    module = torch.get_device_module(device)
    if hasattr(module, "default_stream"):
        stream.wait_stream(module.default_stream(device))


def event_after(stream: Any, device: torch.device) -> Any:
    """An event after all that `stream` has queued.

    The host sleeps while it waits for it: CUDA's would otherwise keep a core busy meanwhile.
    """
    if device.type != "cuda":
        return stream.record_event()
    return stream.record_event(torch.cuda.Event(blocking=True))


def wait_for_own_work(stream: Any, device: torch.device) -> None:
    """The same for what this thread has queued: what it is given by the allocator, it may use in
    the order of its own stream only."""
    if not isinstance(stream, _Unstreamed):
        stream.wait_stream(torch.get_device_module(device).current_stream(device))


_batch = threading.local()


@contextmanager
def released_once() -> Iterator[None]:
    """For several moves in a row: inside, `release_cached` puts off what it does to the end.

    Emptying the allocator's cache waits for all that the devices compute, and what comes next takes
    its memory from the driver again.
    """
    if getattr(_batch, "devices", None) is not None:
        yield
        return
    _batch.devices = set()
    try:
        yield
    finally:
        put_off, _batch.devices = _batch.devices, None
        try:
            release_cached(put_off)
        except RuntimeError as error:  # what the body raises says more
            log.warning("could not give unused memory back to the driver: %s", str(error))


def release_cached(devices: Iterable[torch.device]) -> bool:
    """Returns to the driver what is held unused, to be seen free by other programs: the allocator's
    blocks, and the workspaces that cuBLAS keeps for each thread and stream (8 to 32 MiB; those of
    others are made anew when they are needed).

    Returns:
        Whether it has done so; not, if `released_once` does it later.
    """
    if getattr(_batch, "devices", None) is not None:
        _batch.devices.update(devices)
        return False
    for device_type in {device.type for device in devices} - {"cpu"}:
        if device_type == "cuda" and hasattr(torch._C, "_cuda_clearCublasWorkspaces"):
            torch._C._cuda_clearCublasWorkspaces()
        torch.get_device_module(device_type).empty_cache()
    return True
