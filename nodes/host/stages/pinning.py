"""Pins that nodes and buttons ask for, with reports. They last until they are taken off again."""

from __future__ import annotations

from collections.abc import Collection

import torch

import qmove_core as qmove
from qmove_core import for_hosts

from ..contract import HostEntry
from ..models import pins, residency
from ..models.adopted import Adopted
from ..words import say
from . import requests


def pin_value(value: object, choice: str) -> str:
    """Does for all models in a value what was chosen (`pins.choices`); returns a line for each."""
    models, patchers = requests.models_in(value)
    if not models and not patchers:
        return say("{what} holds no model: nothing to pin.", what=requests.what(value))
    return pin_models(models, choice, patchers)


def pin_models(
    models: Collection[Adopted], choice: str, patchers: Collection[HostEntry] = ()
) -> str:
    """Pins models, keeps them on a device, unpins them or leaves them alone; a line for each.

    Raises:
        QMoveError: a model cannot come to where it is to stay. The others keep what they got.
    """
    try:
        lines = [_choose(adopted, choice) for adopted in models]
    finally:
        residency.register(models)  # what stays is not in ComfyUI's list, all else is
    return "\n".join([*lines, *(_choose_for_hosts_own(patcher, choice) for patcher in patchers)])


def _choose(adopted: Adopted, choice: str) -> str:
    name = adopted.name
    if choice == pins.UNPIN:
        if not pins.stays(adopted):
            return say("{name} was not pinned.", name=name)
        adopted.left_alone = False
        _unpin(adopted)
        places = requests.where(adopted)
        return say(
            "Unpinned {name}: it can be parked again. It is {places}.", name=name, places=places
        )
    if choice == pins.FORGET:
        _come_home(adopted)
        _unpin(adopted)
        adopted.left_alone = True
        return say(
            "{name} is left alone from now on, until you choose another pin for it. "
            "It is {places}.",
            name=name,
            places=requests.where(adopted),
        )
    if choice == pins.PIN:
        _come_home(adopted)
        qmove.pin(adopted.movable)
        adopted.left_alone = False
        places = requests.where(adopted)
        return say("Pinned {name}: it stays where it is, {places}.", name=name, places=places)
    device = torch.device(choice)
    requests.make_room_for(adopted, device)
    qmove.pin(adopted.movable, device)
    adopted.left_alone = False
    adopted.refresh()
    return say(
        "Pinned {name}: it is kept on {device}. It is {places}.",
        name=name,
        device=device,
        places=requests.where(adopted),
    )


def _come_home(adopted: Adopted) -> None:
    if adopted.parked:
        adopted.left_alone = False
        residency.bring_home([adopted])


def _unpin(adopted: Adopted) -> None:
    """Takes off each pin that it has, also that of a pipeline whose part it is."""
    while (pin := for_hosts.pin_of(adopted.movable)) is not None and qmove.unpin(pin.model):
        pass


def _choose_for_hosts_own(patcher: HostEntry, choice: str) -> str:
    name = requests.name_of(patcher)
    known = choice in (pins.UNPIN, pins.FORGET)
    pins.choose_for_hosts_own(patcher, choice if known else pins.PIN)
    if choice == pins.UNPIN:
        return say("{name} is ComfyUI's own: qmove may have it unloaded again.", name=name)
    return say(
        "{name} is ComfyUI's own: qmove does not have it unloaded any more. ComfyUI still may, "
        "and chooses its device.",
        name=name,
    )
