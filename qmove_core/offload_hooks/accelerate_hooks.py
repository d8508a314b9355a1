"""accelerate's `CpuOffload`, whose model waits parked. Import it where accelerate is installed."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import CpuOffload, UserCpuOffloadHook, add_hook_to_module
from accelerate.utils import send_to_device
from accelerate.utils.memory import clear_device_cache
from torch import nn

from .. import devices
from ..devices import Device
from ..homes import place_of
from . import between_forwards


class ParkingHook(CpuOffload):  # type: ignore[misc]
    """A model waits parked for its forward, and its predecessor is parked before it comes.

    Attributes:
        execution_device: where the model runs, with its index.
        prev_module_hook: of the model whose turn was before.
    """

    def __init__(self, execution_device: Device | None, prev_module_hook: Any) -> None:
        super().__init__(execution_device, prev_module_hook)
        self.execution_device: torch.device = devices.resolve(self.execution_device)

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Also what `UserCpuOffloadHook.offload` calls."""
        between_forwards.put_away(module, self.execution_device)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        between_forwards.bring_by(self, module)
        return (
            send_to_device(args, self.execution_device),
            send_to_device(kwargs, self.execution_device),
        )

    def qmove_bring(self, module: nn.Module, *, stream: bool) -> None:
        """Called when the module wakes: before anything of it comes home."""
        previous = self.prev_module_hook
        if isinstance(previous, UserCpuOffloadHook) and _is_out(previous.model):
            previous.offload()
            if not isinstance(previous.hook, ParkingHook):
                clear_device_cache()
        between_forwards.bring(module, self.execution_device, stream=stream)


def _is_out(module: nn.Module) -> bool:
    """Whether any parameter lies on a device."""
    return any(place_of(parameter).type not in ("cpu", "meta") for parameter in module.parameters())


def attach(
    model: nn.Module, execution_device: Device | None, prev_module_hook: Any
) -> tuple[nn.Module, Any]:
    """See `qmove_core.accelerate.cpu_offload_with_hook`."""
    hook = ParkingHook(execution_device, prev_module_hook)
    between_forwards.watch_waking()
    hook.init_hook(model)  # what it raises comes before accelerate has changed anything
    add_hook_to_module(model, hook, append=True)
    return model, UserCpuOffloadHook(model, hook)
