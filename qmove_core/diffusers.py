"""A strategy for diffusers' `ComponentsManager` with which its models wait parked.

import qmove_core as qmove

manager = diffusers.ComponentsManager()
pipe = ModularPipeline.from_pretrained(folder, components_manager=manager)
manager.enable_auto_cpu_offload("cuda:0", offload_strategy=qmove.diffusers.offload_strategy())
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import MissingDependency

if TYPE_CHECKING:
    from .offload_hooks.strategy import ParkingStrategy

__all__ = ["offload_strategy"]


def offload_strategy(
    memory_reserve_margin: int | str = "3GB", order: Iterable[str] = ()
) -> ParkingStrategy:
    """For `ComponentsManager.enable_auto_cpu_offload(offload_strategy=...)`, or for its
    `set_offload_strategy`.

    Its models are parked in RAM and come home by qmove, not by `.to()`: quantized ones
    (bitsandbytes, torchao, quanto, ...) leave no byte on the device and come back bit for bit, and
    what did not change is parked again without a copy. For a model that is used as much leaves as
    it lacks room, those first whose next use is farthest: as in the runs before, or as `order`
    says. It stays in force when components are added or removed. After `disable_auto_cpu_offload()`
    the models are parked, and wake by themselves.

    Args:
        memory_reserve_margin: what stays free on the device for what models compute: bytes, or a
            text such as "3GB" or "512MiB".
        order: names of components in the order in which a run uses them; for the first run, where
            no other was seen.

    Raises:
        MissingDependency: diffusers or accelerate is missing, or this diffusers is older than 0.42.
        ValueError: the margin is no size, or negative.
        In a forward as `qmove.restore`: the model stays parked.
    """
    if isinstance(order, str):
        raise ValueError(f"order is a list of names, such as [{order!r}].")
    try:
        from .offload_hooks import diffusers_hooks
    except ImportError as error:
        raise MissingDependency(
            f"An offload strategy needs diffusers 0.42 or newer, and accelerate ({error}). "
            "Install them: pip install 'diffusers>=0.42' accelerate."
        ) from error
    return diffusers_hooks.strategy(memory_reserve_margin, order)
