"""Two models change places: the request, and the way back."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack

import torch

from .. import devices
from ..errors import NotEnoughMemory
from ..memory import budget
from ..moving import moving
from ..settings import settings
from ..transfer.copies import Progress
from ..transfer.exchange import exchange
from ..transfer.moves import MovePlan
from ..transfer.transaction import carry_out
from . import in_use, plans
from .requests import Parked, Restored, park, parked_result, restore, restored_result, wake

log = logging.getLogger("qmove")


@moving()
def swap(
    leaving: object, coming: object, *, progress: Progress | None = None
) -> tuple[Parked, Restored]:
    """Parks `leaving` and brings the parked `coming` home, both at once.

    Each device holds no more meanwhile than the larger of what they have there, and 64 MiB. What
    qmove's host copy of `leaving` still holds unchanged is not copied. RAM need not hold both
    models: where it has too little room, `leaving` takes over the memory that `coming` lay in.
    RAM for the larger of the two and twice the largest storage of each is then enough, however
    often they take turns; often the largest storage of one is. Where VRAM is in pieces, and RAM has
    room for both, all of `leaving` goes first; `progress` then begins anew.

    Args:
        leaving: a model, as for `park`.
        coming: a parked model, as for `restore`.
        progress: as for `park`; what it raises stops the swap.

    Returns:
        What `park` and `restore` would have returned.

    Raises:
        QMoveError: as `park` and `restore`. Both models are then where they were. Should there be
            no way back for `leaving` (another process took its room, the device fails), it is
            parked instead, whole. If RAM has too little room for that as well, both wait with a
            part of each on the device, and come home when there is room.
    """
    started = time.perf_counter()
    out, into = plans.to_park(leaving, wake), plans.to_restore(coming)
    if budget.make_room(_lacking(out, into)):  # that may have parked other models
        out, into = plans.to_park(leaving, wake), plans.to_restore(coming)
    if settings.verify or not out.moves or not into.moves or _share(out, into):
        with devices.released_once():
            return park(leaving, progress=progress), restore(coming, progress=progress)
    done, in_pieces = None, None
    try:
        with ExitStack() as until_done, in_use.kept_still(out):
            done = exchange(out, into, until_done, progress)
    except BaseException as error:
        if done is None:
            _go_back(leaving, coming)
        if not isinstance(error, NotEnoughMemory) or error.limit != budget.IN_PIECES:
            raise
        in_pieces = error
    if done is None:
        assert in_pieces is not None
        return _in_turn(leaving, coming, progress, in_pieces)
    gone, come = done
    seconds = time.perf_counter() - started
    return parked_result(leaving, out, gone, seconds), restored_result(coming, into, come, seconds)


def _in_turn(
    leaving: object, coming: object, progress: Progress | None, in_pieces: NotEnoughMemory
) -> tuple[Parked, Restored]:
    """What `leaving` gives up bit by bit lies in pieces; when all of it has left, that is free as a
    whole. RAM must hold both for it.

    Raises:
        NotEnoughMemory: RAM cannot, or the device has too little room all the same. Both are where
            they were.
    """
    log.info("VRAM is in pieces: one model is parked before the other comes (%s)", str(in_pieces))
    try:
        parked = park(leaving, progress=progress)
    except NotEnoughMemory as error:
        raise in_pieces from error
    try:
        return parked, restore(coming, progress=progress)
    except BaseException:
        restore(leaving)
        raise


def _lacking(out: MovePlan, into: MovePlan) -> dict[torch.device, int]:
    """Bytes that `into` needs on each device beyond those that `out` frees there."""
    freed = out.departing
    return {device: nbytes - freed.get(device, 0) for device, nbytes in into.arriving.items()}


def _share(out: MovePlan, into: MovePlan) -> bool:
    """Whether a storage that is to leave belongs to both models."""
    leaving = {move.source._cdata for move in out.moves}
    return any(holding.storage._cdata in leaving for holding in into.held.holdings)


def _go_back(leaving: object, coming: object) -> None:
    """After a swap that failed: what came leaves again, and what left comes home."""
    try:
        out = plans.to_park(coming, wake, allow_live_graph=True)
        into = plans.to_restore(leaving)
        if out.moves and into.moves:
            with ExitStack() as until_done:
                exchange(out, into, until_done)
        else:
            carry_out(out)
            carry_out(into)
    except BaseException as error:
        log.error("a swap failed, and so did its way back (%s)", str(error))
        _park_where_there_is_room(leaving)
        if not isinstance(error, Exception):
            raise


def _park_where_there_is_room(leaving: object) -> None:
    """Parks what is left of a model on the device, if need be in what the other one left behind."""
    out = plans.to_park(leaving, wake, allow_live_graph=True)
    nothing = MovePlan(out.action, out.held, [], lambda: None)
    try:
        if out.moves:
            with ExitStack() as until_done:
                exchange(out, nothing, until_done)
    except NotEnoughMemory as error:
        log.error(
            "RAM has no room for all of it either, so a part waits on the device: %s", str(error)
        )
    else:
        log.error("%s is parked instead", plans.title(leaving))
