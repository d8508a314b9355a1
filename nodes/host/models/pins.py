"""What the user has said of a model: it stays where it is, or qmove leaves it alone.

A pin is the core's, so that one that another pack sets (`qmove.pin`) is the same. To leave a model
alone is ours: it is in no list of what could be parked, neither qmove's nor ComfyUI's. ComfyUI's
own models only ComfyUI moves: for them either means that qmove has them unloaded no more.
"""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qmove_core import for_hosts

from ..contract import HostEntry
from ..words import say
from .adopted import Adopted

UNPIN, PIN, FORGET = "unpin", "pin", "forget"  # and the name of a device to keep a model on

_of_hosts_own: WeakIdKeyDictionary = WeakIdKeyDictionary()  # ComfyUI's model -> the choice


def choices() -> list[str]:
    """What can be chosen for a model on this machine."""
    return [UNPIN, PIN, *(d for d in for_hosts.known_devices() if d != "cpu"), FORGET]


def choice_of(model: Adopted | HostEntry) -> str:
    """What was chosen for a model. It is cheap."""
    if not isinstance(model, Adopted):
        return str(_of_hosts_own.get(model.model, UNPIN)) if _of_hosts_own.data else UNPIN
    if model.left_alone:
        return FORGET
    pin = for_hosts.pin_of(model.movable) if for_hosts.any_pinned() else None
    return UNPIN if pin is None else PIN if pin.device is None else str(pin.device)


def stays(model: Adopted | HostEntry) -> bool:
    """Whether qmove must not move a model away."""
    return choice_of(model) != UNPIN


def choose_for_hosts_own(entry: HostEntry, choice: str) -> None:
    """Notes a choice for one of ComfyUI's own models, for as long as that lives."""
    if choice == UNPIN:
        _of_hosts_own.pop(entry.model, None)
    else:
        _of_hosts_own[entry.model] = choice


def in_words(model: Adopted | HostEntry) -> str:
    """What was chosen: "pinned", to follow "is"; empty where nothing was."""
    choice = choice_of(model)
    if choice == UNPIN:
        return ""
    if choice == PIN:
        return say("pinned")
    if choice == FORGET:
        return say("left alone, as you asked")
    return say("kept on {device}", device=torch.device(choice))


def way_out() -> str:
    """How a pin is taken off, in words."""
    return say("unpin it (Pin Model, or the VRAM tab)")
