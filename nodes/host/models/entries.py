"""Entries: an adopted model on one device, as ComfyUI's model management sees it.

ComfyUI asks an entry for its sizes, makes it load, and detaches it when it needs the VRAM. Asked
for less than a model's bytes it is parked in part (`partially_unload`): the entry stays in the list
with what is left on the device. Otherwise ComfyUI detaches the entry, which parks the whole model,
drops it and empties the allocator's cache.
"""

from __future__ import annotations

import logging
import math
import uuid
import weakref
from collections.abc import Iterable
from typing import Any

import torch

import qmove_core as qmove

from ..guard import is_interrupt, never_fails
from . import pins
from .adopted import Adopted

log = logging.getLogger("qmove")

_entries: weakref.WeakKeyDictionary[Adopted, dict[torch.device, Entry]] = (
    weakref.WeakKeyDictionary()
)


def entries_of(adopted: Adopted) -> list[Entry]:
    """One entry for each device that is home to a part of the model, or was. They die with it."""
    entries = _entries.setdefault(adopted, {})
    for device in {**adopted.resident, **adopted.parked}:
        if device not in entries:
            entries[device] = Entry(adopted, device)
    return list(entries.values())


def known_entries() -> list[Entry]:
    """All entries of the models that are alive."""
    return [entry for entries in list(_entries.values()) for entry in entries.values()]


_only_from: frozenset[torch.device] | None = None


def unload_only(devices: Iterable[torch.device] | None) -> None:
    """Until the next call entries on other devices than these stay; None: all yield, as usual."""
    global _only_from
    _only_from = None if devices is None else frozenset(devices)


class Entry:
    """The part of a model whose home is `load_device`."""

    parent = None  # ComfyUI's own clones have one

    def __init__(self, adopted: Adopted, device: torch.device) -> None:
        self._adopted = weakref.ref(adopted)
        self.load_device = device
        self.offload_device = torch.device("cpu")
        self.clone_base_uuid = uuid.uuid4()  # from 0.33: equal for clones, and an entry has none
        self.model_options: dict[str, Any] = {}
        self.is_listed = False  # in ComfyUI's list, as far as qmove and ComfyUI have to do with it

    @property
    def model(self) -> Any:
        """The real model, whose death ComfyUI watches; None once it is dead."""
        adopted = self._adopted()
        return adopted.model if adopted is not None else None

    # Sizes: computed on each call, as anything may move the model ---------------------------------

    def model_size(self) -> int:
        adopted = self._adopted()
        parked = adopted.parked.get(self.load_device, 0) if adopted is not None else 0
        return self.loaded_size() + parked

    def loaded_size(self) -> int:
        adopted = self._adopted()
        return adopted.resident.get(self.load_device, 0) if adopted is not None else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    # What ComfyUI makes it do --------------------------------------------------------------------

    def partially_load(
        self, device: torch.device, extra: float, force_patch_weights: bool = False
    ) -> int:
        """Brings the whole model home, however little room is offered: half a model does not run.

        ComfyUI may load it along with models of its own, which a failure of this one must not stop.
        """
        self.is_listed = True
        adopted = self._adopted()
        if adopted is None or self.load_device not in adopted.parked:
            return 0
        before = self.loaded_size()
        try:
            adopted.come_home()
        except Exception as error:
            if is_interrupt(error):
                raise
            # A log record may be kept as well: it has the text, not the error with its frames.
            log.warning("%s stays parked: %s", adopted.name, str(error))
        return self.loaded_size() - before

    @never_fails("park a part of a model for ComfyUI, which needs its memory", 0)
    def partially_unload(
        self, offload_device: torch.device, memory_to_free: float, **options: Any
    ) -> int:
        """Parks as many layers as it takes to free so many bytes of VRAM, the last used first.

        Returns:
            The bytes that it freed. Where they are too few, and where nothing is left (0 then),
            ComfyUI detaches the entry next.
        """
        adopted, before = self._adopted(), self.loaded_size()
        if adopted is None or not 0 < memory_to_free < before:
            return 0
        self._park(adopted, {self.load_device: math.ceil(memory_to_free)})
        left = self.loaded_size()
        return before - left if left else 0

    @never_fails("park a model for ComfyUI, which needs its memory", None)
    def detach(self, unpatch_all: bool = True) -> None:
        """Parks the model. With `unpatch_all=False` ComfyUI only lists it anew.

        One that another manager moves is left to that one.
        """
        self.is_listed = False  # where it is listed anew, it is loaded once more
        adopted = self._adopted()
        if adopted is not None and unpatch_all:
            self._park(adopted)

    def _park(self, adopted: Adopted, free: dict[Any, int] | None = None) -> None:
        may_leave = _only_from is None or self.load_device in _only_from
        if adopted.moved_by or pins.stays(adopted) or not may_leave:
            return
        try:
            adopted.park(free)
        except qmove.Pinned as error:  # with what it is a part of
            log.debug("%s", error)
        except (qmove.NotEnoughMemory, qmove.InUse) as error:  # the model stays
            log.warning("%s", error)

    # What it asks of its own models, and an entry does not have ----------------------------------

    def is_clone(self, other: object) -> bool:
        return other is self

    def model_patches_models(self) -> list[Any]:
        return []

    def get_nested_additional_models(self) -> list[Any]:
        return []

    def model_patches_to(self, device_or_dtype: Any) -> None:
        pass

    def model_dtype(self) -> None:
        return None

    def lowvram_patch_counter(self) -> int:
        return 0

    def is_dynamic(self) -> bool:
        return False

    def model_mmap_residency(self, free: bool = False) -> tuple[int, int]:
        return 0, 0

    def pinned_memory_size(self) -> int:
        return 0

    def partially_unload_ram(self, ram_to_unload: float, **options: Any) -> int:
        return 0

    def loaded_ram_size(self) -> int:
        return 0
