"""The hooks of diffusers' `ComponentsManager`, which park where their strategy is qmove's.

diffusers lets a strategy choose which models leave, and moves them itself, by `.to()`, also before
it asks for the first time. So the methods of its hook ask here first. Hooks with another strategy
do what they always did. Import it where diffusers and accelerate are installed.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterable
from typing import Any

import diffusers
from accelerate.utils import send_to_device
from accelerate.utils.modeling import convert_file_size_to_int
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.modular_pipelines.components_manager import ComponentsManager, CustomOffloadHook
from torch import nn

from ..devices import resolve
from ..errors import MissingDependency, NotEnoughDeviceMemory
from ..parking.staying import is_pinned
from . import between_forwards
from .strategy import ParkingStrategy

_installing = threading.Lock()


def strategy(memory_reserve_margin: int | str, order: Iterable[str]) -> ParkingStrategy:
    """See `qmove_core.diffusers.offload_strategy`."""
    reserve = convert_file_size_to_int(memory_reserve_margin)  # raises ValueError
    _install()
    return ParkingStrategy(reserve, order)


def _install() -> None:
    """Once for a process.

    Raises:
        MissingDependency: this diffusers takes no strategy.
    """
    takes = inspect.signature(ComponentsManager.enable_auto_cpu_offload).parameters
    if "offload_strategy" not in takes:
        raise MissingDependency(
            f"The installed diffusers, {diffusers.__version__}, takes no offload_strategy; "
            "0.42 does: pip install 'diffusers>=0.42'"
        )
    between_forwards.watch_waking()
    with _installing:
        if not hasattr(CustomOffloadHook, "qmove_bring"):
            CustomOffloadHook.init_hook = _init_hook(CustomOffloadHook.init_hook)
            CustomOffloadHook.pre_forward = _pre_forward(CustomOffloadHook.pre_forward)
            ComponentsManager.enable_auto_cpu_offload = _enable(
                ComponentsManager.enable_auto_cpu_offload
            )
            CustomOffloadHook.qmove_bring = property(_bringing)


def _parks(hook: Any) -> bool:
    return isinstance(hook.offload_strategy, ParkingStrategy)


def _init_hook(original: Any) -> Any:
    @functools.wraps(original)
    def init_hook(self: Any, module: nn.Module) -> nn.Module:
        """Also what `UserCustomOffloadHook.offload` calls."""
        if not _parks(self):
            return original(self, module)  # type: ignore[no-any-return]
        if not _is_group_offload_enabled(module):
            between_forwards.put_away(module, resolve(self.execution_device))
        return module

    return init_hook


def _pre_forward(original: Any) -> Any:
    @functools.wraps(original)
    def pre_forward(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not _parks(self):
            return original(self, module, *args, **kwargs)
        between_forwards.bring_by(self, module)
        device = self.execution_device
        return send_to_device(args, device), send_to_device(kwargs, device)

    return pre_forward


def _enable(original: Any) -> Any:
    @functools.wraps(original)
    def enable_auto_cpu_offload(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(original).bind(self, *args, **kwargs)
        before = self._offload_strategy
        # diffusers does so itself when a component was added or removed, and forgets the strategy.
        again = self._auto_offload_enabled and given.arguments.get("device") is getattr(
            self, "_auto_offload_device", None
        )
        if again and isinstance(before, ParkingStrategy):
            given.arguments.setdefault("offload_strategy", before)
        original(*given.args, **given.kwargs)

    return enable_auto_cpu_offload


def _bringing(hook: Any) -> Any:
    """`hook.qmove_bring`, for hooks with qmove's strategy only."""
    if not _parks(hook):
        raise AttributeError("qmove_bring")
    return functools.partial(_bring, hook)


def _bring(hook: Any, module: nn.Module, *, stream: bool) -> None:
    """Makes room for a model that is used, and brings it."""
    device = resolve(hook.execution_device)
    strategy: ParkingStrategy = hook.offload_strategy
    strategy.note_use(hook.model_id)
    places_itself = _is_group_offload_enabled(module)
    if not places_itself and between_forwards.is_here(module, device):
        return
    others = [
        other
        for other in hook.other_hooks or ()
        if other.model is not module
        and not _is_group_offload_enabled(other.model)
        and not is_pinned(other.model)
    ]
    for other in strategy(others, hook.model_id, module, device):
        other.offload()
    if places_itself:
        return
    try:
        between_forwards.bring(module, device, stream=stream)
    except NotEnoughDeviceMemory:
        staying = [other for other in others if between_forwards.bytes_on(other.model, device)]
        if not staying:
            raise
        for other in staying:
            other.offload()
        between_forwards.bring(module, device, stream=stream)
