"""What nodes and buttons ask for: park, restore, materialize, free VRAM; with reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import comfy, meter
from ..contract import HostEntry
from ..models import holders, pins, residency, wires
from ..models.adopted import Adopted, adopted_models
from ..models.loose_tensors import group_of
from ..models.residency import Model
from . import auto_parking, executor, waiting

HOME = "home"


def park_value(value: object) -> str:
    """Parks all models in a value; returns a line for each."""
    models, patchers = models_in(value)
    if not models and not patchers:
        return f"{what(value)} holds no model: nothing to park."
    return park_models(models, patchers)


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
    asked: list[Model] = [*models, *patchers]
    lines = [_stays(model) for model in asked if pins.stays(model)]
    models = [adopted for adopted in models if not pins.stays(adopted)]
    patchers = [patcher for patcher in patchers if not pins.stays(patcher)]
    with for_hosts.lock:  # waits for what ComfyUI's own thread parks just now
        before = {adopted.number: adopted.resident for adopted in models}
    loaded = {id(patcher): int(patcher.loaded_size()) for patcher in patchers}
    residency.park([*(adopted for adopted in models if before[adopted.number]), *patchers])
    for adopted in models:
        for device, nbytes in before[adopted.number].items():
            left = adopted.resident.get(device, 0)
            stayed = f"; {readable_bytes(left)} stayed, the log says why" if left else ""
            lines.append(
                f"Parked {adopted.name}: {readable_bytes(nbytes - left)} left {device}{stayed}."
            )
        if not before[adopted.number]:
            lines.append(f"{adopted.name} was not on a device: {where(adopted)}.")
    for patcher in patchers:
        left = loaded[id(patcher)] - int(patcher.loaded_size())
        lines.append(
            f"ComfyUI unloaded {name_of(patcher)}: "
            f"{readable_bytes(left)} left {patcher.load_device}."
        )
    return "\n".join(lines)


def park_all() -> str:
    """Parks all models one by one, so that each can be cancelled; returns a line for each."""
    with for_hosts.lock:
        models = [adopted for adopted in adopted_models() if adopted.resident]
    reports = [park_models([model]) for model in models]
    return "\n".join(reports) or "No model is in VRAM: nothing to park."


def restore_all(device: str = HOME) -> str:
    """Brings all parked models home, or to `device`; returns a line for each."""
    with for_hosts.lock:
        models = [adopted for adopted in adopted_models() if adopted.parked]
    return restore_models(models, device) or "No model is parked: nothing to restore."


def restore_value(value: object, device: str = HOME, wait_for: int = 0) -> str:
    """Brings all models in a value home, or to `device`; returns a line for each.

    With `wait_for` it first makes room of so many bytes where they come to, and waits until other
    programs have freed what is lacking.
    """
    models, patchers = models_in(value)
    if not models and not patchers:
        return f"{what(value)} holds no model: nothing to restore."
    lines = [
        free_vram(wait_for, str(target), wait=True)
        for target in (_targets(models, patchers, device) if wait_for else ())
    ]
    lines += [restore_models(models, device)] if models else []
    host = comfy.model_management()
    if patchers and host is not None:
        host.load_models_gpu(patchers)
        lines += [
            f"ComfyUI loaded {name_of(patcher)} on {patcher.load_device}, which it chooses itself."
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
    away = {adopted.number: sum(adopted.parked.values()) for adopted in models}
    if device == HOME:
        residency.bring_home(models)
    else:
        for adopted in models:
            _move(adopted, torch.device(device))
    residency.register(models)
    said = [_stays(adopted) for adopted in staying]
    lines = [
        f"Restored {adopted.name}: {readable_bytes(away[adopted.number])}, now {where(adopted)}."
        if away[adopted.number]
        else f"{adopted.name} was not parked; it is {where(adopted)}."
        for adopted in models
    ]
    return "\n".join([*said, *lines])


def _stays(model: Model) -> str:
    name = model.name if isinstance(model, Adopted) else name_of(model)
    return f"{name} is {pins.in_words(model)}: it stays as it is. To change that, {pins.WAY_OUT}."


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
        own = " ComfyUI's own models have no meta tensors." if found.patchers else ""
        return f"{what(value)} holds no model that qmove could materialize.{own}"
    lines = []
    for module in found.modules:
        name, missing = type(module).__name__, qmove.inventory(module).meta
        if missing:
            qmove.materialize_meta_tensors(module, target_device=target_device)
            nbytes = readable_bytes(sum(tensor.nbytes for tensor in missing))
            lines.append(
                f"Materialized {name}: {len(missing)} tensors, {nbytes}, on {target_device}."
            )
        else:
            lines.append(f"{name} has no meta tensors: nothing to materialize.")
    residency.take_in(found.modules)
    return "\n".join(lines)


def free_vram(nbytes: int, device: str | None = None, *, wait: bool = False) -> str:
    """Parks models, the least useful first, until `nbytes` are free on `device`, or on each one.

    Where that is not enough, and with `wait`, it waits until other programs have freed the rest.

    Returns:
        A line for each device.
    """
    order = auto_parking.order_to_park(
        executor.running_graph(), comfy.running_node(), auto_parking.NodeInputs()
    )
    lines = []
    for target in [torch.device(device)] if device else meter.devices():
        there = [model for model in order if auto_parking.is_on(model, target)]
        residency.have_dynamic_yield(target, nbytes)
        parked = residency.park_until_free(there, target, nbytes)
        if wait and (meter.free_bytes(target) or 0) < nbytes:
            lines += waiting.wait_for_others(target, nbytes)
        free = meter.free_bytes(target) or 0
        names = ", ".join(m.name if isinstance(m, Adopted) else name_of(m) for m in parked)
        line = f"{target}: {readable_bytes(free)} are free, parked {names or 'nothing'}."
        if free < nbytes:
            wanted = readable_bytes(nbytes)
            line += f" That is less than the {wanted} asked for: no model is left to park."
            line = "\n".join([line, *holders.pinned_on(target)])
        lines.append(line)
    return "\n".join(lines) or "This machine has no accelerator: there is no VRAM to free."


def where(adopted: Adopted) -> str:
    places = [f"{readable_bytes(n)} on {device}" for device, n in adopted.resident.items()]
    places += [
        f"{readable_bytes(n)} parked, home is {device}" for device, n in adopted.parked.items()
    ]
    return ", ".join(places) or "in CPU memory"


def what(value: object) -> str:
    name = type(value).__name__
    return f"{'An' if name[:1].lower() in 'aeiou' else 'A'} {name}"


def name_of(patcher: HostEntry) -> str:
    return type(patcher.model).__name__
