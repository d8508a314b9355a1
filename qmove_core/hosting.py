"""Callbacks of a program that hosts models (ComfyUI): for what yields to an allocation, when a move
lacks room, when RAM is short, for what it has page-locked, before a model wakes, after a move."""

from __future__ import annotations

from collections.abc import Callable

import torch

AskForRoom = Callable[[torch.device, int], None]  # device, bytes that should be free on it
Yielding = Callable[[torch.device], int]  # bytes
GiveUp = Callable[[int], None]  # bytes of RAM that are lacking
PageLocked = Callable[[], int]  # bytes
Waking = Callable[[object, bool], bool]  # model, whether it may arrive while it runs
Moved = Callable[[], None]

_yielding: list[Yielding] = []
_ask_for_room: list[AskForRoom] = []
_give_up: list[GiveUp] = []
_page_locked: list[PageLocked] = []
_waking: list[Waking] = []
_moved: list[Moved] = []


def on_yielding(yielding: Yielding) -> None:
    """Registers `yielding`, which says how many bytes of a device go by themselves as soon as
    something else is allocated there. No figure of the driver has them as free."""
    if yielding not in _yielding:
        _yielding.append(yielding)


def on_shortage(ask_for_room: AskForRoom) -> None:
    """Registers `ask_for_room`, which is called when a move needs more than is free on a device.

    It may park other models. If too little is free after that, the move fails.
    """
    if ask_for_room not in _ask_for_room:
        _ask_for_room.append(ask_for_room)


def on_ram_shortage(give_up: GiveUp) -> None:
    """Registers `give_up`, which is called when RAM is short, for a park or for other programs, and
    what qmove kept to be faster is given back already.

    It may let go of models that it keeps alive, in whatever thread it is called; but for those that
    move just now, they take no RAM when it returns.
    """
    if give_up not in _give_up:
        _give_up.append(give_up)


def on_page_locking(page_locked: PageLocked) -> None:
    """Registers `page_locked`, which says how many bytes of RAM the host of this program has
    page-locked itself, without qmove's and PyTorch's. qmove locks so much less.

    It is called before each piece is locked, in any thread, and must not move anything.
    """
    if page_locked not in _page_locked:
        _page_locked.append(page_locked)


def on_waking(waking: Waking) -> None:
    """Registers `waking`, called before a parked model comes home because it is used.

    It may park others first, and bring the model home itself: then it returns True. What it raises
    leaves the model parked.
    """
    if waking not in _waking:
        _waking.append(waking)


def on_move(moved: Moved) -> None:
    """Registers `moved`, called after each move (waking too) and pin in the thread that made it."""
    if moved not in _moved:
        _moved.append(moved)


def yielding_bytes(device: torch.device) -> int:
    """What `on_yielding` registered says."""
    return sum(callback(device) for callback in _yielding)


def page_locked_bytes() -> int:
    """What `on_page_locking` registered says."""
    return sum(callback() for callback in _page_locked)


def ask_for_room(device: torch.device, nbytes: int) -> None:
    """Calls what `on_shortage` registered."""
    for callback in _ask_for_room:
        callback(device, nbytes)


def ask_for_ram(nbytes: int) -> None:
    """Calls what `on_ram_shortage` registered."""
    for callback in _give_up:
        callback(nbytes)


def tell_waking(model: object, stream: bool) -> bool:
    """Calls what `on_waking` registered, until one of them has brought the model home."""
    return any(callback(model, stream) for callback in _waking)


def tell_moved() -> None:
    """Calls what `on_move` registered."""
    for callback in _moved:
        callback()


def forget(*callbacks: Callable[..., object]) -> None:
    """Calls these no more."""
    registered: list[list] = [_yielding, _ask_for_room, _give_up, _page_locked, _moved]
    for some in registered:
        some[:] = [callback for callback in some if callback not in callbacks]
