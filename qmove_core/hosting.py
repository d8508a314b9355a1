"""Where a program that hosts the models (ComfyUI) hooks in: it is asked for room before a move fails, and told of each move."""

from __future__ import annotations

from collections.abc import Callable

import torch

AskForRoom = Callable[[torch.device, int], None]  # device, bytes that should be free on it
Moved = Callable[[], None]

_ask_for_room: list[AskForRoom] = []
_moved: list[Moved] = []


def on_shortage(ask_for_room: AskForRoom) -> None:
    """Calls `ask_for_room` when a move needs more than is free on a device. It may park others.

    If too little is free after that, the move fails.
    """
    if ask_for_room not in _ask_for_room:
        _ask_for_room.append(ask_for_room)


def on_move(moved: Moved) -> None:
    """Calls `moved` after each move, in the thread that moved; models that woke by themselves are told of as well."""
    if moved not in _moved:
        _moved.append(moved)


def ask_for_room(device: torch.device, nbytes: int) -> None:
    """Asks everybody who may have room to give."""
    for callback in _ask_for_room:
        callback(device, nbytes)


def tell_moved() -> None:
    """Tells everybody who wants to know."""
    for callback in _moved:
        callback()
