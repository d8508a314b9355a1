"""A forward that is running is not robbed of its weights.

Nothing is on the path of a resident model: who moves one looks at the other threads. First its
outermost modules fall asleep, so that a forward that begins now waits for the lock that the move
holds, and those that have begun are given time to end. Then everything of it falls asleep, and its
tensors get the class that looks after them, for whoever came in by another way. A thread that waits
for the lock in the middle of a forward goes on when the model is parked: it wakes. Where it would
not wake (`move`) such a thread is in the way.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import nn

from ..actions import Action
from ..errors import InUse
from ..interrupts import interrupts_deferred
from ..transfer.moves import MovePlan
from . import pins, plans, sleeping
from .away_tensors import put_away, take_home

PATIENCE = 30.0  # seconds that a running forward is given
_FORWARDS = frozenset({"forward", "_call_impl", "_wrapped_call_impl"})


class _WaitForMove:
    """What wakes the modules of a model that is being moved, and was awake."""

    waits, gives_way = False, True

    def __call__(self, module: nn.Module) -> None:
        """The lock was waited for already."""


@contextmanager
def kept_still(plan: MovePlan, *, wakes: bool = True, heeds_pins: bool = True) -> Iterator[None]:
    """Keeps other threads from using what is about to move; what fails leaves no trace of it.

    Args:
        wakes: whether the model wakes when it is used after the move.
        heeds_pins: whether it stays for another thread that keeps it home.

    Raises:
        InUse: another thread pins it, or has not left it in time. Nothing has moved.
    """
    if not any(move.came_from.type != "cpu" for move in plan.moves):
        yield
        return
    pin = pins.held_by_another_thread(plan.held) if heeds_pins else None
    if pin is not None and pin.thread is not None:
        raise InUse(plan.action, pin.thread.name, "keeps it home (qmove.resident)")
    modules, waiting = list(plan.held.modules.values()), _WaitForMove()
    ids = {id(module) for module in modules}

    def let_go() -> None:
        # All of them, and not what the calls returned: an interrupt inside one loses its result.
        sleeping.wake_up(module for module in modules if sleeping.sleeps_by(module, waiting))
        take_home(tensor for move in plan.moves for tensor in move.tensors)

    try:
        try:
            sleeping.put_to_sleep(plans.outermost(modules), waiting)
            _let_forwards_end(plan.action, ids, wakes)
            sleeping.put_to_sleep(modules, waiting)
            put_away(tensor for move in plan.moves for tensor in move.tensors)
            _let_forwards_end(plan.action, ids, wakes)
            torch.clear_autocast_cache()  # it holds copies of the weights in another dtype
            yield
        except BaseException:
            with interrupts_deferred():
                let_go()
            raise
    except BaseException:  # the same once more: another thread's exception may have ended the first
        let_go()
        raise


def _let_forwards_end(action: Action, modules: set[int], wakes: bool) -> None:
    deadline = time.monotonic() + PATIENCE
    while (thread := _thread_inside(modules, wakes)) is not None:
        if time.monotonic() > deadline:
            raise InUse(action, thread, f"has been inside of it for {PATIENCE:.0f} s")
        time.sleep(0.0005)


def _thread_inside(modules: set[int], wakes: bool) -> str | None:
    """The name of another thread that is inside of one of these modules."""
    mine = threading.get_ident()  # this frame would hold itself, and the plan with it
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != mine}
    inside = [ident for ident in frames if _is_inside(frames[ident], modules, wakes)]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return names.get(inside[0], str(inside[0])) if inside else None


def _is_inside(innermost: FrameType, modules: set[int], wakes: bool) -> bool:
    waits_for_lock = _package(innermost) == "qmove_core"
    if waits_for_lock and wakes:
        return False  # no operator of it is running
    frame: FrameType | None = innermost
    while frame is not None and _package(frame) == "torch":
        frame = frame.f_back
    if frame is not None and not waits_for_lock and _is_method(frame, modules):
        return True  # a method that reads weights, or a forward
    frame = innermost
    while frame is not None:
        if frame.f_code.co_name in _FORWARDS and _is_method(frame, modules):
            return True
        frame = frame.f_back
    return False


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_method(frame: FrameType, modules: set[int]) -> bool:
    code = frame.f_code
    return code.co_argcount > 0 and id(frame.f_locals.get(code.co_varnames[0])) in modules
