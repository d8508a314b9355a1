"""What nodes and buttons ask for: park, restore and materialize; with reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import comfy, meter
from ..contract import HostEntry
from ..models import names, pins, residency, wires
from ..models.adopted import Adopted, adopted_models
from ..models.loose_tensors import group_of
from ..models.residency import Model
from ..words import say
from . import making_room

HOME = "home"


@dataclass(frozen=True)
class Parking:
    """Attributes:
    report: a line for each model, for people.
    freed: bytes that have left each device.
    """

    report: str
    freed: dict[torch.device, int]


def park_value(value: object) -> str:
    """Parks all models in a value; returns a line for each."""
    return parking_of(value).report


def parking_of(value: object) -> Parking:
    """Parks all models in a value."""
    models, patchers = models_in(value)
    if not models and not patchers:
        return Parking(say("{what} holds no model: nothing to park.", what=what(value)), {})
    return _park(models, patchers)


def models_in(value: object) -> tuple[list[Adopted], list[HostEntry]]:
    """The models in a value, and ComfyUI's own ones. Tensors in dicts and lists count as one."""
    found = wires.find_models([value])
    models: list[object] = [*found.modules, *found.tensor_owners]
    if found.loose:
        name = f"{type(value).__name__} of {len(found.loose)} tensors at {id(value):x}"
        models.append(group_of(name, found.loose))
    return residency.take_in(models, registered=False), found.patchers


def park_models(models: Collection[Adopted], patchers: Collection[HostEntry] = ()) -> str:
    """Parks models, but none that is to stay; returns a line for each."""
    return _park(models, patchers).report


def _park(models: Collection[Adopted], patchers: Collection[HostEntry]) -> Parking:
    asked: list[Model] = [*models, *patchers]
    lines = [_stays(model) for model in asked if pins.stays(model)]
    freed: dict[torch.device, int] = {}
    models = [adopted for adopted in models if not pins.stays(adopted)]
    patchers = [patcher for patcher in patchers if not pins.stays(patcher)]
    with for_hosts.lock:  # waits for what ComfyUI's own thread parks just now
        before = {adopted.number: adopted.resident for adopted in models}
    loaded = {id(patcher): int(patcher.loaded_size()) for patcher in patchers}
    residency.park([*(adopted for adopted in models if before[adopted.number]), *patchers])
    for adopted in models:
        for device, nbytes in before[adopted.number].items():
            left = nbytes - adopted.resident.get(device, 0)
            freed[device] = freed.get(device, 0) + left
            lines.append(_parked(adopted.name, device, left, nbytes - left))
        if not before[adopted.number]:
            lines.append(
                say(
                    "{name} was not on a device: {places}.",
                    name=adopted.name,
                    places=where(adopted),
                )
            )
    for patcher in patchers:
        device, left = patcher.load_device, loaded[id(patcher)] - int(patcher.loaded_size())
        freed[device] = freed.get(device, 0) + left
        size, name = readable_bytes(left), name_of(patcher)
        lines.append(
            say(
                "ComfyUI unloaded {name}: {size} left {device}.",
                name=name,
                size=size,
                device=device,
            )
        )
    return Parking("\n".join(lines), freed)


def _parked(name: str, device: torch.device, left: int, stayed: int) -> str:
    sizes = {"size": readable_bytes(left), "rest": readable_bytes(stayed)}
    if stayed:
        return say(
            "Parked {name}: {size} left {device}; {rest} stayed, the log says why.",
            name=name,
            device=device,
            **sizes,
        )
    return say("Parked {name}: {size} left {device}.", name=name, device=device, **sizes)


def park_all() -> str:
    """Parks all models one by one, so that each can be cancelled; returns a line for each."""
    with for_hosts.lock:
        models = [adopted for adopted in adopted_models() if adopted.resident]
    reports = [park_models([model]) for model in models]
    return "\n".join(reports) or say("No model is in VRAM: nothing to park.")


def restore_all(device: str = HOME) -> str:
    """Brings all parked models home, or to `device`; returns a line for each."""
    with for_hosts.lock:
        models = [adopted for adopted in adopted_models() if adopted.parked]
    return restore_models(models, device) or say("No model is parked: nothing to restore.")


def restore_value(value: object, device: str = HOME, wait_for: int = 0) -> str:
    """Brings all models in a value home, or to `device`; returns a line for each.

    With `wait_for` it first makes room of so many bytes where they come to, and waits until other
    programs have freed what is lacking.
    """
    models, patchers = models_in(value)
    if not models and not patchers:
        return say("{what} holds no model: nothing to restore.", what=what(value))
    lines = [
        making_room.free(wait_for, str(target), wait=True).report
        for target in (_targets(models, patchers, device) if wait_for else ())
    ]
    lines += [restore_models(models, device)] if models else []
    host = comfy.model_management()
    if patchers and host is not None:
        host.load_models_gpu(patchers)
        lines += [
            say(
                "ComfyUI loaded {name} on {device}, which it chooses itself.",
                name=name_of(patcher),
                device=patcher.load_device,
            )
            for patcher in patchers
        ]
    return "\n".join(lines)


def _targets(
    models: Collection[Adopted], patchers: Collection[HostEntry], device: str
) -> list[torch.device]:
    """The accelerators that something of these is to come to."""
    if device == HOME:
        targets = [home for adopted in models for home in adopted.parked]
    else:
        target = torch.device(device)
        targets = [target for m in models if m.parked or any(d != target for d in m.resident)]
    targets += [p.load_device for p in patchers if p.loaded_size() < p.model_size()]
    return [target for target in dict.fromkeys(targets) if target.type != "cpu"]


def restore_models(models: Sequence[Adopted], device: str = HOME) -> str:
    """Brings models home, or to `device`, but none that is to stay; returns a line for each."""
    staying = [m for m in models if m.left_alone or (device != HOME and pins.stays(m))]
    models = [adopted for adopted in models if adopted not in staying]
    away = {m.number: sum(m.parked.values()) or _on_its_way(m) for m in models}
    if device == HOME:
        residency.bring_home(models)
    else:
        for adopted in models:
            _move(adopted, torch.device(device))
    residency.register(models)
    said = [_stays(adopted) for adopted in staying]
    lines = [
        say(
            "Restored {name}: {size}, now {places}."
            if away[adopted.number]
            else "{name} was not parked; it is {places}.",
            name=adopted.name,
            size=readable_bytes(away[adopted.number]),
            places=where(adopted),
        )
        for adopted in models
    ]
    return "\n".join([*said, *lines])


def _on_its_way(adopted: Adopted) -> int:
    """Waits for a model that was asked home already (it is needed next), and is neither parked nor
    there meanwhile. Returns the bytes that came."""
    if adopted.resident:
        return 0
    qmove.restore(adopted.movable)
    return sum(adopted.resident.values())


def _stays(model: Model) -> str:
    return say(
        "{name} is {pinned}: it stays as it is. To change that, {way_out}.",
        name=model.name if isinstance(model, Adopted) else name_of(model),
        pinned=pins.in_words(model),
        way_out=pins.way_out(),
    )


def _move(adopted: Adopted, target: torch.device) -> None:
    make_room_for(adopted, target)
    qmove.move(adopted.movable, target)
    adopted.refresh()


def make_room_for(adopted: Adopted, target: torch.device) -> None:
    """Has room made for all of a model on `target`."""
    if target.type != "cpu":
        resident = adopted.resident
        coming = sum(resident.values()) + sum(adopted.parked.values()) - resident.get(target, 0)
        if coming > (meter.free_bytes(target) or 0):
            residency.make_room(target, coming, [adopted])


def materialize_value(value: object, target_device: str = "cpu") -> str:
    """Gives the meta tensors of all models in a value their real data; returns a line for each."""
    found = wires.find_models([value])
    if not found.modules:
        lines = [say("{what} holds no model that qmove could materialize.", what=what(value))]
        lines += [say("ComfyUI's own models have no meta tensors.")] if found.patchers else []
        return " ".join(lines)
    lines = []
    for module in found.modules:
        name, missing = type(module).__name__, qmove.inventory(module).meta
        if missing:
            qmove.materialize_meta_tensors(module, target_device=target_device)
            nbytes = readable_bytes(sum(tensor.nbytes for tensor in missing))
            lines.append(
                say(
                    "Materialized {name}: {count} tensors, {size}, on {device}.",
                    name=name,
                    count=len(missing),
                    size=nbytes,
                    device=target_device,
                )
            )
        else:
            lines.append(say("{name} has no meta tensors: nothing to materialize.", name=name))
    residency.take_in(found.modules)
    return "\n".join(lines)


def free_vram(nbytes: int, device: str | None = None, *, wait: bool = False) -> str:
    """`making_room.free`, in words: a line for each device."""
    return making_room.free(nbytes, device, wait=wait).report


def where(adopted: Adopted) -> str:
    """Where the bytes of a model lie, in words."""
    places = [
        say("{size} on {device}", size=readable_bytes(nbytes), device=device)
        for device, nbytes in adopted.resident.items()
    ]
    places += [
        say("{size} parked, home is {device}", size=readable_bytes(nbytes), device=device)
        for device, nbytes in adopted.parked.items()
    ]
    return ", ".join(places) or say("in CPU memory")


def what(value: object) -> str:
    """A value for the beginning of a sentence, by its type."""
    name = type(value).__name__
    if name[:1].lower() in "aeiou":
        return say("An {type}", type=name)
    return say("A {type}", type=name)


def name_of(patcher: HostEntry) -> str:
    return names.of(patcher.model)
