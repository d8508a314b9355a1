"""Which models leave a device for one that is used: those that are used again last."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import devices
from ..model.inventory import inventory
from .between_forwards import bytes_on
from .use_order import UseOrder


class ParkingStrategy:
    """A callable for diffusers' `enable_auto_cpu_offload(offload_strategy=...)`.

    Attributes:
        reserve: bytes of the device that stay free for what a model computes.
    """

    def __init__(self, reserve: int, order: Iterable[str] = ()) -> None:
        names = list(order)
        self.reserve = reserve
        self._names, self._uses = frozenset(names), UseOrder(names)

    def note_use(self, model_id: str) -> None:
        """This model is used now. The calls make up what is known of the order."""
        self._uses.note(self._name_of(model_id))

    def __call__(
        self, hooks: Sequence[Any], model_id: str, model: Any, execution_device: torch.device
    ) -> list[Any]:
        """The hooks among `hooks` whose models are to leave `execution_device`, so that `model` has
        room there.

        The one whose next use is farthest leaves first; one that is not expected to be used again
        before that, the longest unused first. None leaves that need not; all, where that is not
        enough. Where the device does not say what is free, all leave.
        """
        self.note_use(model_id)
        held = inventory(model)
        needed = held.nbytes - held.by_device.get(str(execution_device), 0)
        free = devices.free_memory(execution_device)
        lacking = None if free is None else needed + self.reserve - free
        if lacking is not None and lacking <= 0:
            return []
        expected = self._uses.uses_until()

        def by_next_use(hook: Any) -> tuple[float, int]:
            name = self._name_of(hook.model_id)
            return -expected.get(name, float("inf")), self._uses.last_use(name)

        sizes = {id(hook): bytes_on(hook.model, execution_device) for hook in hooks}
        there = sorted((hook for hook in hooks if sizes[id(hook)]), key=by_next_use)
        if lacking is None:
            return there
        leaving, freed = [], 0
        for hook in there:
            if freed >= lacking:
                break
            leaving.append(hook)
            freed += sizes[id(hook)]
        for hook in reversed(leaving[:]):  # what is used again soonest stays, if it can
            if freed - sizes[id(hook)] >= lacking:
                leaving.remove(hook)
                freed -= sizes[id(hook)]
        return leaving

    def _name_of(self, model_id: str) -> str:
        """The name of a component if it was given in the order, else its id, `name_123`."""
        name = model_id.rpartition("_")[0]
        return name if name in self._names else model_id
