"""accelerate's `cpu_offload_with_hook`, with a hook that parks.

import qmove_core as qmove

text_encoder, hook_1 = qmove.accelerate.cpu_offload_with_hook(text_encoder, "cuda:0")
unet, hook_2 = qmove.accelerate.cpu_offload_with_hook(unet, "cuda:0", hook_1)
vae, hook_3 = qmove.accelerate.cpu_offload_with_hook(vae, "cuda:0", hook_2)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .devices import Device
from .errors import MissingDependency

__all__ = ["cpu_offload_with_hook"]


def cpu_offload_with_hook(
    model: nn.Module, execution_device: Device | None = None, prev_module_hook: Any = None
) -> tuple[nn.Module, Any]:
    """Parks a model, and brings it to `execution_device` when it is used. It stays there until
    `hook.offload()`, or until the next model of the chain is used.

    As accelerate's function of this name, for quantized models too: no byte of the model stays on
    the device, and none is changed. A second offload of unchanged weights copies nothing.

    Args:
        model: a module. What of it lies on the host stays there until the model is used.
        execution_device: "cuda:0", 1, ...; None for the current accelerator (the CPU without one).
        prev_module_hook: the `UserCpuOffloadHook` of the model whose turn was before, accelerate's
            own too: that model is offloaded before anything of this one comes onto the device.

    Returns:
        The model, and an `accelerate.hooks.UserCpuOffloadHook`: `.offload()` parks the model;
        `.remove()` takes the hook off, and leaves the model where it is. A parked one then wakes by
        itself as any parked model does.

    Raises:
        MissingDependency: accelerate is not installed.
        UnknownDevice: there is no such device.
        QMoveError: as `qmove.park`, and in a forward as `qmove.restore`: the model is where it was.
    """
    try:
        from .offload_hooks import accelerate_hooks
    except ImportError as error:
        raise MissingDependency(
            f"An offload hook needs accelerate 1.0 or newer ({error}): pip install accelerate"
        ) from error
    return accelerate_hooks.attach(model, execution_device, prev_module_hook)
