"""Models that stay somewhere: out or home for a `with`, pinned until they are unpinned."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import devices, homes, hosting
from ..actions import Action
from ..devices import Device
from ..errors import CannotMove
from ..memory import budget
from ..model.holdings import Inventory
from ..model.inventory import inventory
from ..moving import moving
from . import pins, records, rolling
from .requests import Moved, Parked, Restored, is_parked, move, park, restore, restored_result, wake


@contextmanager
def parked(model: object, **options: Any) -> Iterator[Parked]:
    """Keeps `model` out of VRAM inside the body, and home again after it, also when that raises.

    Args:
        model: as for `park`.
        **options: as for `park`.

    Yields:
        What the park did.

    Raises:
        QMoveError: as `park`; on leaving as `restore`: the model stays parked then.
    """
    result = park(model, **options)
    try:
        yield result
    finally:
        restore(model)


@contextmanager
def resident(model: object, *, at_most: int | None = None) -> Iterator[Restored]:
    """Keeps `model` home inside the body; if it was parked before, it is parked again after it.

    Other threads cannot park or move it meanwhile. Where bodies overlap, the last one parks it.

    Args:
        model: as for `park`.
        at_most: bytes of VRAM that it may take, on each device, if that is less than the model:
            then as many of its layers as fit stay home, and in each forward the others come in
            ahead of their use and go after it. A layer that goes is copied out only if it was
            changed. What the model computes takes VRAM beside that. With a limit below 64 MiB so
            does a MiB for digests. Of bodies inside each other the smallest limit holds. What the
            body itself restores stays until it is parked.

    Raises:
        QMoveError: as `restore`. Another thread that parks or moves it gets InUse.
        ValueError: `at_most` is negative.
        NotEnoughMemory: also where a layer is larger than the limit. Nothing was moved.
        CannotMove: it would have to stream, and a part of it is compiled.
        InUse: another thread keeps it home, without a limit.
        LiveAutogradGraph: from a forward with a limit that records a graph for gradients.
    """
    if at_most is not None and at_most < 0:
        raise ValueError(f"at_most is a number of bytes, not {at_most}; None means no limit.")
    pin = pins.Pin(model, thread=threading.current_thread())
    rolls: list[rolling.Rolling] = []

    def end() -> None:
        pins.let_go(pin)
        comes_home = bool(rolls) and rolls[0].leave(pin)
        rolls.clear()
        if pin.parks_after:
            pin.parks_after = False
            if not is_pinned(model):
                _park_again(model, pin)
        elif comes_home:
            restore(model)

    try:  # twice: an interrupt may come between the body and the first one
        try:
            with moving():
                held, record = inventory(model), records.record_of(model)
                running = rolling.of(held)
                if running is not None and not running.has_all(held):
                    reason = "a part of it runs in a body of resident(at_most=...); end that first"
                    raise CannotMove(Action("stream", model), [(type(model).__name__, reason)])
                pin.parks_after = is_parked(model) and running is None
                is_in_part = any(holding.device.type != "cpu" for holding in held.holdings)
                pin.frees = _parked_bytes(held) if is_in_part else None
                pin.extra = record.extra if record else []
                pins.hold(pin)
                if running is None and at_most is not None:
                    running = rolling.Rolling(model, pin.extra, wake)
                if running is not None:
                    rolls.append(running)
            yield restore(model) if running is None else _roll(running, model, pin, at_most)
        finally:
            end()
    finally:
        end()


@moving()
def _roll(running: rolling.Rolling, model: object, pin: pins.Pin, at_most: int | None) -> Restored:
    started = time.perf_counter()
    plan, done = running.enter(pin, at_most)
    return restored_result(model, plan, done, time.perf_counter() - started)


def _parked_bytes(held: Inventory) -> dict[torch.device, int]:
    """Bytes of a model that are parked, by their home."""
    away = [homes.origin_of_tensor(holding.tensors[0]) for holding in held.holdings]
    return budget.bytes_by_device([(o.nbytes, o.home) for o in away if o and o.is_parked])


def _park_again(model: object, pin: pins.Pin) -> None:
    """Parks what was parked before a body: of what was home in part so much that no more takes
    VRAM than did."""
    free: dict[Device, int] | None = None
    if pin.frees is not None:
        parked = _parked_bytes(inventory(model))
        free = {d: max(0, nbytes - parked.get(d, 0)) for d, nbytes in pin.frees.items()}
    park(model, extra=pin.extra, free=free)


def pin(model: object, device: Device | None = None) -> Moved:
    """Keeps `model` where it runs until `unpin`: it is not parked, swapped or moved any more.

    A parked one comes home first. What comes into the model later is pinned with it. The pin is on
    this object, not on copies of it, and keeps nothing alive: it ends with the model. Pinning again
    replaces the pin.

    Args:
        model: as for `park`.
        device: keep it on this device. It moves there whole, and what of it was parked before it
            came into the model comes home to there.

    Returns:
        What bringing it there took.

    Raises:
        QMoveError: as `restore`, or with a `device` as `move`. Nothing is pinned then that was not
            before.
    """
    place = None if device is None else devices.resolve(device)
    with moving():
        before = pins.lift(model)
        try:
            moved = restore(model) if place is None else move(model, place)
        except BaseException:
            pins.put_back(before)
            raise
        pins.keep(model, place)
    hosting.tell_moved()
    return moved


def unpin(model: object) -> bool:
    """Takes the pin off again. The model stays where it is, and can be parked and moved.

    Args:
        model: the very object that was pinned; its parts and what it is a part of keep their pins.

    Returns:
        Whether it was pinned.
    """
    with moving():
        lifted = pins.lift(model)
    if lifted:
        hosting.tell_moved()
    return bool(lifted)


def is_pinned(model: object) -> bool:
    """Whether `model` is pinned, or belongs as a whole to pinned models.

    Args:
        model: as for `park`.
    """
    with moving():
        return pins.is_pinned(model)
