"""What hooks of other libraries do with a model between its forwards and before one."""

from __future__ import annotations

import itertools
import sys
from contextlib import suppress
from typing import Protocol

import torch
from torch import nn

from .. import homes, hosting
from ..errors import NoTensors
from ..integrations.accelerate_dispatch import hooks_of
from ..model.inventory import inventory
from ..model.kinds.bitsandbytes_layout import awaits_quantization, is_of
from ..parking import sleeping
from ..parking.requests import is_parked, move, park, restore
from ..parking.staying import is_pinned


class BringingHook(Protocol):
    """A hook of accelerate that brings its module to where it runs, and makes room for it first."""

    def qmove_bring(self, module: nn.Module, *, stream: bool) -> None: ...


def watch_waking() -> None:
    """Lets a parked model with such a hook be brought by it when it wakes, so that the room for it
    is made before."""
    hosting.on_waking(_bring_by_hook)


def _bring_by_hook(model: object, stream: bool) -> bool:
    hooks = hooks_of(model) if isinstance(model, nn.Module) else []
    bringing = [hook for hook in hooks if hasattr(hook, "qmove_bring")]
    for hook in bringing:
        hook.qmove_bring(model, stream=stream)
    return bool(bringing)


def put_away(module: nn.Module, device: torch.device) -> None:
    """Parks a module that runs on `device`. What lies on the host stays there, and a pinned model
    where it is."""
    if is_pinned(module):
        return
    if device.type == "cpu":
        move(module, device, allow_live_graph=True)
        return
    with suppress(NoTensors):  # an image processor, a safety checker that does nothing
        # A graph keeps what it saved on the device, as it does after a `.to()`.
        park(module, allow_live_graph=True)


def bring_by(hook: BringingHook, module: nn.Module) -> None:
    """Called by a hook before a forward; no compiler looks into it."""
    qmove_bring = hook.qmove_bring
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        qmove_bring = torch.compiler.disable(qmove_bring)
    qmove_bring(module, stream=True)


def bring(module: nn.Module, device: torch.device, *, stream: bool) -> None:
    """Brings a module to `device`, where it runs next: parked or not, quantized or not."""
    if is_here(module, device):
        return
    if is_parked(module):
        restore(module, device, stream=stream)
    if any(map(_awaits_quantization, module.parameters())):
        module.to(device)  # bitsandbytes quantizes there
    if not is_here(module, device):
        move(module, device, allow_live_graph=True)


def _awaits_quantization(parameter: nn.Parameter) -> bool:
    is_quantizable = is_of(parameter, "Params4bit") or is_of(parameter, "Int8Params")
    return is_quantizable and awaits_quantization(parameter)


def is_here(module: nn.Module, device: torch.device) -> bool:
    """Whether a module can run on `device`; like accelerate's own hooks it looks at the first
    tensor only, as it is asked in each forward."""
    if sleeping.is_parked(module):
        return False
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    if first is None:
        return True
    origin = homes.origin_of_tensor(first)
    if origin is not None and origin.arrival is not None:  # it may run while it arrives
        return origin.home == device
    return homes.place_of(first) == device


def bytes_on(module: nn.Module, device: torch.device) -> int:
    """Bytes that a module has on `device`, those of quantization states among them."""
    return inventory(module).by_device.get(str(device), 0)
