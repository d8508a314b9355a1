"""The devices of this machine, behind one small face over `torch.accelerator` and `torch.<device type>`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .errors import UnknownDevice

CPU = torch.device("cpu")

Device = str | int | torch.device
DeviceMap = Mapping[str, Device]


def resolve(device: str | int | torch.device) -> torch.device:
    """The device with its index, checked to exist: "cuda" -> the current cuda device, 1 -> the accelerator's second.

    Raises:
        UnknownDevice: it cannot be parsed, or the machine has no such device.
    """
    try:
        parsed = _accelerator(device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UnknownDevice(
            f"{device!r} is not a device. This machine has: {', '.join(known())}."
        ) from error
    if parsed.type == "cpu":
        return CPU
    if parsed.type == "meta":
        raise UnknownDevice(
            "Moving to the meta device would throw the data away. To free VRAM use qmove.park(model)."
        )
    if parsed.index is None:
        parsed = torch.device(parsed.type, _current_index(parsed.type))
    if str(parsed) not in known():
        raise UnknownDevice(f"There is no {parsed} on this machine. It has: {', '.join(known())}.")
    return parsed


def placement(target: Device | DeviceMap) -> Callable[[str], torch.device | None]:
    """Where what has a given name is to go: to the one device, or where the longest fitting prefix of a device_map says.

    The prefix "" fits every name. None where nothing fits.

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
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()))]


def _accelerator(index: int) -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        raise UnknownDevice(
            f"Device {index} was asked for, but this machine has no accelerator, only the CPU."
        )
    return torch.device(accelerator.type, index)


def _current_index(device_type: str) -> int:
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type != device_type:
        return 0
    return torch.accelerator.current_device_index()


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be allocated on `device` now: free there, plus what PyTorch's allocator holds unused.

    None where the backend cannot say (mps, some third-party devices): then only the allocation itself can tell.
    """
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return None
    free, _total = module.mem_get_info(device)
    return free + module.memory_reserved(device) - module.memory_allocated(device)


def synchronize(devices: Iterable[torch.device]) -> None:
    """Waits until everything queued on these devices is done, so that their bytes can be read or freed."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


class _Unstreamed:
    """Stands for a stream on backends that have none: what is queued runs in order, and one can only wait for all of it."""

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
    """qmove's own stream for one purpose ("in", "out", "digest"): they overlap with each other and with the model."""
    module = torch.get_device_module(device)
    return module.Stream(device=device) if has_streams(device) else _Unstreamed(device)


def has_streams(device: torch.device) -> bool:
    """Whether copies to and from `device` can run beside what the model computes."""
    return hasattr(torch.get_device_module(device), "Stream")


def on_stream(stream: Any, device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this thread queues its work for `device` on `stream`."""
    return (
        nullcontext()
        if isinstance(stream, _Unstreamed)
        else torch.get_device_module(device).stream(stream)
    )


def wait_for_work(stream: Any, device: torch.device) -> None:
    """Puts `stream` behind what this thread and the device's default stream have queued until now. The host does not wait."""
    if isinstance(stream, _Unstreamed):
        return
    module = torch.get_device_module(device)
    stream.wait_stream(module.current_stream(device))
    if hasattr(module, "default_stream"):
        stream.wait_stream(module.default_stream(device))


def release_cached(devices: Iterable[torch.device]) -> None:
    """Gives the allocator's unused blocks back to the driver, for other processes and for ComfyUI's own figures."""
    for device_type in {device.type for device in devices} - {"cpu"}:
        torch.get_device_module(device_type).empty_cache()
