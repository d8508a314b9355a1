"""What is to be read for which tensor: found, checked, and known to fit, before the first byte."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import devices
from ..actions import Action
from ..devices import Device, DeviceMap
from ..errors import OffloadedDataError
from ..integrations import diffusers_offload
from ..integrations.accelerate_dispatch import Slot, part_keys, refuse_lost, slots
from ..integrations.weights_map import Source, Sources, Unusable
from ..memory import budget
from ..model.holdings import Inventory
from .ties import find_ties


@dataclass
class Piece:
    """One tensor to materialize.

    Attributes:
        slots: every place in the model that it takes; tied weights have several.
        tensor: the object that stands in all of them afterwards. A meta tensor, or a real one that others are tied to.
        source: where its data lies.
        device: where it goes.
        dtype, shape: of the tensor, which may change them later.
        opened: the source's own tensor.
        joins_real: the tensor was real before, and needs no data.
        real: what the tensor gets to look into.
        group: the group of diffusers' group offload whose file the data is in.
        parts: what hangs on a quantized weight and comes with it, by name.
        digest: of the bytes it has at first, where asked for.
        part_digests: those of the parts.
    """

    slots: list[Slot]
    tensor: torch.Tensor
    source: Source
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    opened: torch.Tensor
    joins_real: bool
    group: Any = None
    parts: dict[str, Source] = field(default_factory=dict)
    real: torch.Tensor | None = None
    digest: int | None = None
    part_digests: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.slots[0].full_name

    @property
    def is_shared(self) -> bool:
        """Whether the model is to look into the source's own memory."""
        return self.source.is_shared_as(self.tensor.dtype, self.device)


def plan(action: Action, held: Inventory, place: Callable[[str], torch.device]) -> list[Piece]:
    """A piece for every tensor to be, with its data found and checked.

    Raises:
        OffloadedDataError: with everything that is wrong.
        MetaTensorsPresent: nobody has data for some meta tensors.
    """
    sources = Sources()
    problems: list[tuple[str, str]] = []
    pieces = [
        *_of_dispatch(held, sources, problems, place),
        *_of_groups(held, sources, problems, place),
    ]
    if problems:
        advice = "Repair the offload folder or its index, or load the model again. The offloaded model would fail there as well."
        raise OffloadedDataError(action, problems, advice)
    refuse_lost(action, held)
    return pieces


def _of_dispatch(
    held: Inventory,
    sources: Sources,
    problems: list[tuple[str, str]],
    place: Callable[[str], torch.device],
) -> list[Piece]:
    """What accelerate keeps in RAM, in safetensors files or in `.dat` files."""
    found: list[tuple[Slot, Source]] = []
    parts: dict[int, dict[str, Source]] = {}
    for slot in slots(held.modules):
        try:
            source = sources.find(slot.hook.weights_map, slot.key)
            mismatch = source.mismatch(slot.tensor)
            if slot.tensor.device.type == "meta":
                keys = part_keys(slot).items()
                parts[id(slot.tensor)] = {
                    part: sources.find(slot.hook.weights_map, key) for part, key in keys
                }
            if not mismatch:
                found.append((slot, source))
        except KeyError as error:
            mismatch = f"the map that the dispatch keeps its weights in has no such entry: {error}"
        except Unusable as error:
            mismatch = str(error)
        if mismatch and slot.tensor.device.type == "meta":
            problems.append((slot.full_name, mismatch))
    if problems:
        return []
    return [
        _piece(tied.slots, tied.tensor, tied.source, place, parts=parts.get(id(tied.tensor), {}))
        for tied in find_ties(held, found)
    ]


def _of_groups(
    held: Inventory,
    sources: Sources,
    problems: list[tuple[str, str]],
    place: Callable[[str], torch.device],
) -> Iterator[Piece]:
    """What diffusers' group offload keeps in files of its own."""
    groups = [
        group
        for group in diffusers_offload.groups_of(held.modules.values())
        if group.offload_to_disk_path
    ]
    places = _places(held) if groups else {}
    for group in groups:
        missing = diffusers_offload.absent(group)
        for key, tensor in group.key_to_tensor.items():
            taken = [Slot(*found, tensor, None, key) for found in places.get(id(tensor), ())]
            try:
                source = sources.in_safetensors(Path(group.safetensors_file_path), key)
                problem = source.mismatch(tensor)
            except Unusable as error:
                problem = str(error)
            if problem and key in missing:
                problems.append((taken[0].full_name if taken else key, problem))
            elif not problem and taken:
                yield _piece(
                    taken, tensor, source, place, joins_real=key not in missing, group=group
                )


def _places(
    held: Inventory,
) -> dict[int, list[tuple[nn.Module, dict[str, torch.Tensor | None], str, str]]]:
    """(module, registered, name, full name) of every parameter and buffer, by its id."""
    places: dict[int, list[tuple[nn.Module, dict[str, torch.Tensor | None], str, str]]] = (
        defaultdict(list)
    )
    for module_name, module in held.modules.items():
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                full_name = f"{module_name}.{name}" if module_name else name
                places[id(tensor)].append((module, registered, name, full_name))  # type: ignore[arg-type]
    return places


def _piece(
    taken: list[Slot],
    tensor: torch.Tensor,
    source: Source,
    place: Callable[[str], torch.device],
    joins_real: bool | None = None,
    **details: Any,
) -> Piece:
    if joins_real is None:
        joins_real = tensor.device.type != "meta"
    device = place(taken[0].full_name)
    return Piece(
        taken,
        tensor,
        source,
        device,
        tensor.dtype,
        tensor.shape,
        source.open(),
        joins_real,
        **details,
    )


def check_budget(action: Action, pieces: Iterable[Piece]) -> None:
    """Raises NotEnoughMemory if it does not fit. What is mapped from files counts too: it is of use only in RAM."""
    needed: dict[torch.device, int] = defaultdict(int)
    for piece in pieces:
        if not piece.joins_real and not (piece.is_shared and piece.source.file is None):
            needed[piece.device] += piece.tensor.nbytes
        for source in piece.parts.values():
            if not (source.file is None and piece.device.type == "cpu"):
                needed[piece.device] += source.nbytes
    budget.require(action, needed, HOST_ADVICE, DEVICE_ADVICE)


HOST_ADVICE = (
    "Delete or restore another parked model, or raise the limit named. Or leave the model dispatched, with a smaller "
    "device_map: one that puts less on cpu and disk."
)
DEVICE_ADVICE = "Park another model, materialize to the CPU (target_device='cpu'), or give a device_map that puts less there."


def placement(target: Device | DeviceMap) -> Callable[[str], torch.device]:
    """Where the meta tensor of a given name is to go: the CPU, if a device_map does not say."""
    place = devices.placement(target)
    return lambda name: place(name) or devices.CPU
