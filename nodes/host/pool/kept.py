"""One output that the pool keeps: its models, the time that they took, what makes it outdated."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import qmove_core as qmove
from qmove_core import for_hosts

from ..contract import HostEntry
from ..models import pins
from ..models.adopted import Adopted, adopted_of
from . import named_files, rules

log = logging.getLogger("qmove")


class Kept(for_hosts.Kept):
    """Attributes:
    key: ComfyUI's hash of the inputs, without the ids of the nodes.
    class_name: of the node that made it.
    outputs: one list of values for each output, as ComfyUI had them.
    models: the objects among them that qmove moves.
    patchers: ComfyUI's own models among them.
    seconds: how long the node ran.
    written: the inputs that may name files.
    used_in: the number of the prompt that used it last.
    """

    def __init__(
        self,
        key: str,
        class_name: str,
        outputs: list[Any],
        models: list[Any],
        patchers: list[HostEntry],
        seconds: float,
        written: list[Any],
        used_in: int,
        forget: Callable[[Kept], None],
    ) -> None:
        self.key, self.class_name, self.outputs = key, class_name, outputs
        self.models, self.patchers = models, patchers
        self.seconds, self.written, self.used_in = seconds, written, used_in
        self._forget = forget
        node_class = rules.class_named(self.class_name)
        self._class = weakref.ref(node_class) if node_class is not None else None
        self._structure = _structure_of(self.models)
        self.files = named_files.stamps_of(self.written)

    @property
    def adopted(self) -> list[Adopted]:
        """Its models as qmove knows them now: one may have become a part of another."""
        found = [adopted_of(model) for model in self.models]
        return list({a.number: a for a in found if a is not None}.values())

    @property
    def name(self) -> str:
        names = [adopted.name for adopted in self.adopted]
        names += [type(patcher.model).__name__ for patcher in self.patchers]
        return f"{', '.join(names)} of {self.class_name}"

    @property
    def stays(self) -> bool:
        """Whether the user has pinned a model of it."""
        return any(map(pins.stays, self.adopted)) or any(map(pins.stays, self.patchers))

    def identities(self) -> set[Any]:
        """What its models are known by; clones of a patcher share theirs."""
        return {*self.adopted, *(id(patcher.model) for patcher in self.patchers)}

    def bytes_in_ram(self) -> dict[Any, int]:
        """Bytes of RAM that each of its models takes. ComfyUI's own count as a whole: they may be
        unloaded to RAM at any time."""
        sizes: dict[Any, int] = {adopted: adopted.in_ram for adopted in self.adopted}
        return sizes | {id(p.model): int(p.model_size()) for p in self.patchers}

    def bytes_in_all(self) -> dict[Any, int]:
        """Bytes that each of its models takes, wherever they are."""
        sizes = self.bytes_in_ram()
        for adopted in self.adopted:
            sizes[adopted] += sum(adopted.resident.values()) + adopted.on_disk
        return sizes

    def bytes_on_disk(self) -> dict[Any, int]:
        return {adopted: adopted.on_disk for adopted in self.adopted}

    @property
    def may_be_on_disk(self) -> bool:
        """ComfyUI's own models are its business."""
        return not self.patchers

    def to_disk(self) -> bool:
        for adopted in self.adopted:
            try:
                adopted.park_on_disk()
            except qmove.QMoveError as error:
                # The text, not the error with its frames: a log record may be kept.
                log.warning("%s", str(error))
                return False
        return True

    def let_go(self) -> bool:
        models = [weakref.ref(adopted.model) for adopted in self.adopted]
        self._forget(self)
        # Lists of callers may still hold it; ComfyUI has the same objects in its own lists.
        self.outputs, self.models, self.patchers = [], [], []
        if any(model() is not None for model in models):
            gc.collect()
        return True

    def outdated(self) -> str | None:
        """Why it may not be given back, in words; None where it may."""
        known = self._class() if self._class is not None else None
        if known is None or known is not rules.class_named(self.class_name):
            return "its node is another one now"
        changed = named_files.first_changed(self.written, self.files)
        if changed is not None:
            return f"{changed} has changed"
        if any(adopted.lost for adopted in self.adopted):
            return "somebody has emptied its weights"
        if _structure_of(self.models) != self._structure:
            return "somebody has changed its layers"
        return None


def _structure_of(models: Sequence[Any]) -> int:
    """Differs when layers or parameters come, go, or get another shape: adapters, for example.

    Buffers do not count: many a model makes some in its first run.
    """
    structure: list[Any] = []
    with torch._C.DisableTorchFunctionSubclass():
        for module in models:
            for name, part in module.named_modules() if isinstance(module, nn.Module) else ():
                structure.append(name)
                structure += [
                    (key, tuple(parameter.shape), parameter.dtype)
                    for key, parameter in part._parameters.items()
                    if parameter is not None
                ]
    return hash(tuple(structure))
