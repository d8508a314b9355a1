"""Who holds the VRAM of a device that is no model: what flows on wires, what others move, other
programs, and what nobody in this process explains. None of it counts as free, or as ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import meter
from ..words import say
from . import finding, names, pins, residency
from .adopted import Adopted, adopted_models


@dataclass(frozen=True)
class Holder:
    """Attributes:
    name: in words.
    nbytes: of the device.
    way_out: what would free them.
    kind: "wires" or "unexplained", for which a browser has words of its own; else empty.
    """

    name: str
    nbytes: int
    way_out: str
    kind: str = ""


_UNKNOWN = "not explained by this process (contexts, engines in C++, other programs)"


def others_on(device: torch.device) -> list[Holder]:
    """What is no model, the biggest first. What nobody explains comes last."""
    held = [
        Holder(
            "images and latents on wires",
            finding.on_wires().get(device, 0),
            "a run of another workflow drops them",
            "wires",
        )
    ]
    for left in finding.left_alone():
        where = f"{left.name} ({left.reason})"
        held.append(Holder(where, left.resident.get(device, 0), "only what holds it can free it"))
    for process in for_hosts.other_processes(device):
        held.append(Holder(process.title, process.nbytes, "end that program, or have it unload"))
    named = sorted((holder for holder in held if holder.nbytes), key=lambda holder: -holder.nbytes)
    unknown = _unexplained(device, sum(holder.nbytes for holder in named))
    return [*named, unknown] if unknown.nbytes > 0 else named


def _unexplained(device: torch.device, named: int) -> Holder:
    reading = meter.read(device)
    used = reading.used if reading is not None else 0
    models = sum(holder.nbytes for holder in models_on(device))
    way_out = "a restart of ComfyUI frees what is its own"
    return Holder(_UNKNOWN, used - models - named, way_out, "unexplained")


def models_on(device: torch.device) -> list[Holder]:
    """The models on a device, qmove's and ComfyUI's, the biggest first."""
    held = []
    for adopted in adopted_models():
        where = (
            f"{adopted.name} ({adopted.place})" if adopted.place not in ("", adopted.name) else ""
        )
        nbytes = adopted.resident.get(device, 0)
        held.append(_holder(adopted, where or adopted.name, nbytes, _PARK))
    for entry in residency.hosts_own_entries():
        if entry.load_device == device:
            yields = residency.is_dynamic(entry)
            name = f"{names.of(entry.model)} (ComfyUI's own{', dynamic' if yields else ''})"
            way_out = "it yields by itself" if yields else "ComfyUI's Unload Models"
            held.append(_holder(entry, name, int(entry.loaded_size()), way_out))
    return sorted((holder for holder in held if holder.nbytes), key=lambda holder: -holder.nbytes)


_PARK = "Park Model, or the VRAM tab"


def _holder(model: residency.Model, name: str, nbytes: int, way_out: str) -> Holder:
    if pins.stays(model):
        return Holder(f"{name}, {pins.in_words(model)}", nbytes, pins.way_out())
    return Holder(name, nbytes, way_out)


def pinned_on(device: torch.device) -> list[str]:
    """Lines for people: the models that stay on a device because the user wants it."""
    models: list[residency.Model] = [*adopted_models(), *residency.hosts_own_entries()]
    lines = []
    for model in models if any(map(pins.stays, models)) else ():
        if isinstance(model, Adopted):
            name, there = model.name, model.resident.get(device, 0)
        else:
            name = names.of(model.model)
            there = int(model.loaded_size()) if model.load_device == device else 0
        if there and pins.stays(model):
            said = say(
                "{device}: {name} ({size}) stays, it is {pinned}. To free it: {way_out}.",
                device=device,
                name=name,
                size=readable_bytes(there),
                pinned=pins.in_words(model),
                way_out=pins.way_out(),
            )
            lines.append(f"  {said}")
    return lines


def table(device: torch.device, most: int = 6) -> list[str]:
    """Lines for people: who holds the device now, and what would free it."""
    held = sorted([*models_on(device), *others_on(device)], key=lambda holder: -holder.nbytes)
    return [
        f"  {readable_bytes(h.nbytes)}: {h.name}. To free it: {h.way_out}." for h in held[:most]
    ]
