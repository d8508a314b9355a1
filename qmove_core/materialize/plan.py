"""What is to be read for which tensor: found, checked, and known to fit, before the first byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import devices
from ..actions import Action
from ..class_variants import own_class
from ..devices import Device, DeviceMap
from ..errors import OffloadedDataError
from ..integrations import diffusers_offload
from ..integrations.accelerate_dispatch import part_keys, refuse_compiled, refuse_lost, slots
from ..integrations.tensor_slots import Slot, registered_slots
from ..integrations.weights_map import Source, Sources, Unusable
from ..memory import budget
from ..model.holdings import Inventory
from ..model.kinds import wrappers
from .ties import find_ties

Place = Callable[[str], torch.device]  # where the meta tensor of a given name is to go
Problems = list[tuple[str, str]]  # (name, what is wrong)

HOST_ADVICE = (
    "Delete or restore another parked model, or raise the limit named. Or leave the model "
    "dispatched, with a smaller device_map: one that puts less on cpu and disk."
)
DEVICE_ADVICE = (
    "Park another model, materialize to the CPU (target_device='cpu'), or give a device_map that "
    "puts less there."
)


@dataclass(eq=False)
class TensorPlan:
    """One tensor to materialize.

    Attributes:
        slots: every place in the model that it takes; tied weights have several.
        tensor: the object that stands in all of them afterwards. A meta tensor, or a real one that
            others are tied to.
        source: where its data lies.
        device: where it goes.
        is_real: the tensor was real before, and needs no data.
        group: the group of diffusers' group offload whose file the data is in.
        parts: the parts of a quantized weight, such as its scales, by name.
        dtype, shape: of the tensor, which may change them later.
        opened: the source's own tensor.
        data: what the tensor gets to look into, where that is not the source's own memory.
        checksum: of the bytes it has at first, where asked for.
        part_checksums: those of the parts.
        inner: what the inner tensors of a wrapper subclass get to look into, the innermost ones.
    """

    slots: list[Slot]
    tensor: torch.Tensor
    source: Source
    device: torch.device
    is_real: bool
    group: Any = None
    parts: dict[str, Source] = field(default_factory=dict)
    dtype: torch.dtype = field(init=False)
    shape: torch.Size = field(init=False)
    opened: torch.Tensor = field(init=False)
    data: torch.Tensor | None = None
    checksum: int | None = None
    part_checksums: dict[str, int] = field(default_factory=dict)
    inner: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dtype, self.shape = self.tensor.dtype, self.tensor.shape
        self.opened = self.source.open()

    @property
    def name(self) -> str:
        return self.slots[0].full_name

    @property
    def is_shared(self) -> bool:
        """Whether the model is to look into the source's own memory."""
        return self.source.is_shared_as(self.dtype, self.device)

    @property
    def is_wrapper(self) -> bool:
        """Whether the bytes are those of tensors inside it."""
        return wrappers.is_wrapper(self.tensor)

    @property
    def needs_reading(self) -> bool:
        if self.is_real or self.is_wrapper:  # of a wrapper the inner tensors are copied
            return False
        return not (self.is_shared and self.source.file is None)


def plan(action: Action, held: Inventory, place: Place) -> list[TensorPlan]:
    """A plan for every tensor to materialize, with its data found and checked.

    Raises:
        OffloadedDataError: with everything that is wrong.
        MetaTensorsPresent: no dispatch has data for some meta tensors.
        CannotMove: it was dispatched after `torch.compile`.
    """
    refuse_compiled(action, held)
    sources, problems = Sources(), Problems()
    plans = [
        *_of_dispatch(held, sources, problems, place),
        *_of_groups(held, sources, problems, place),
    ]
    if problems:
        advice = (
            "Repair the offload folder or its index, or load the model again. "
            "The offloaded model would fail there as well."
        )
        raise OffloadedDataError(action, problems, advice)
    refuse_lost(action, held)
    return plans


def _of_dispatch(
    held: Inventory, sources: Sources, problems: Problems, place: Place
) -> list[TensorPlan]:
    """What accelerate keeps in RAM, in safetensors files or in `.dat` files."""
    found: list[tuple[Slot, Source]] = []
    parts: dict[int, dict[str, Source]] = {}
    for slot in slots(held.modules):
        weights_map, is_meta = slot.hook.weights_map, slot.tensor.device.type == "meta"
        try:
            source = sources.find(weights_map, slot.key)
            mismatch = source.mismatch(slot.tensor) or _other_inside(slot.tensor, source)
            if is_meta:
                keys = part_keys(slot).items()
                parts[id(slot.tensor)] = {
                    part: sources.find(weights_map, key) for part, key in keys
                }
            if not mismatch:
                found.append((slot, source))
        except KeyError as error:
            mismatch = f"the map that the dispatch keeps its weights in has no such entry: {error}"
        except Unusable as error:
            mismatch = str(error)
        if mismatch and is_meta:
            problems.append((slot.full_name, mismatch))
    if problems:
        return []
    return [
        TensorPlan(
            tied.slots,
            tied.tensor,
            tied.source,
            place(tied.slots[0].full_name),
            is_real=tied.tensor.device.type != "meta",
            parts=parts.get(id(tied.tensor), {}),
        )
        for tied in find_ties(held, found)
    ]


def _other_inside(tensor: torch.Tensor, source: Source) -> str:
    """Why a wrapper subclass cannot have its data from there; empty if it can, or is none."""
    if not wrappers.is_wrapper(tensor):
        return ""
    content = source.open()
    if [own_class(outer) for outer in wrappers.outers(tensor)] != [
        own_class(outer) for outer in wrappers.outers(content)
    ]:
        return f"it is {own_class(content).__name__} in {source.where}, and another in the model"
    for inside, there in zip(wrappers.innermost(tensor), wrappers.innermost(content), strict=False):
        if (inside.shape, inside.dtype) != (there.shape, there.dtype):
            return f"a tensor inside it has another shape or dtype in {source.where}"
    return ""


def _of_groups(
    held: Inventory, sources: Sources, problems: Problems, place: Place
) -> Iterator[TensorPlan]:
    """What diffusers' group offload keeps in files of its own."""
    groups = [
        group
        for group in diffusers_offload.groups_of(held.modules.values())
        if group.offload_to_disk_path
    ]
    places: dict[int, list[Slot]] = defaultdict(list)
    for slot in registered_slots(held.modules) if groups else ():
        places[id(slot.tensor)].append(slot)
    for group in groups:
        missing = diffusers_offload.absent(group)
        for key, tensor in group.key_to_tensor.items():
            taken = places.get(id(tensor), [])
            try:
                source = sources.in_safetensors(Path(group.safetensors_file_path), key)
                problem = source.mismatch(tensor)
            except Unusable as error:
                problem = str(error)
            if problem and key in missing:
                problems.append((taken[0].full_name if taken else key, problem))
            elif not problem and taken:
                device = place(taken[0].full_name)
                yield TensorPlan(taken, tensor, source, device, key not in missing, group)


def check_budget(action: Action, plans: Iterable[TensorPlan]) -> None:
    """Raises NotEnoughMemory. Mapped files count too: they are of use only in RAM."""
    needed: dict[torch.device, int] = defaultdict(int)
    for planned in plans:
        if planned.needs_reading:
            needed[planned.device] += planned.tensor.nbytes
        if planned.is_wrapper and not planned.is_real and planned.device.type != "cpu":
            needed[planned.device] += sum(t.nbytes for t in wrappers.innermost(planned.opened))
        for source in planned.parts.values():
            if not (source.file is None and planned.device.type == "cpu"):
                needed[planned.device] += source.nbytes
    budget.make_room(needed)
    budget.require(action, needed, HOST_ADVICE, DEVICE_ADVICE)


def placement(target: Device | DeviceMap) -> Place:
    """The CPU for what a device_map does not name."""
    place = devices.placement(target)
    return lambda name: place(name) or devices.CPU
