"""A card that is nearly full and in pieces, and Ctrl-C at ten moments: every move ends wholly
before or wholly after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import torch

import qmove_core as qmove

from .. import models
from ..checks import Checks
from ..machine import MIB, Sizes


def run(checks: Checks, sizes: Sizes) -> None:
    model = models.stack(sizes.model // 4)
    before = models.hashes(model)
    nbytes = qmove.inventory(model).nbytes
    qmove.park(model)
    for name, room in (("room for the model and 5 %", 1.05), ("too little room", 0.5)):
        ballast = _leave(int(nbytes * room))
        try:
            qmove.restore(model)
            outcome = "restored"
        except qmove.NotEnoughMemory as error:
            outcome = f"NotEnoughMemory: {error}".splitlines()[0]
        home = not qmove.is_parked(model)
        told = outcome == "restored" if home else outcome.startswith("NotEnoughMemory")
        checks.expect(
            f"restore with {name}: whole, or refused with figures", told, outcome, "out of memory"
        )
        if room < 1:
            checks.expect("a refused restore leaves the model parked", not home, outcome, "atomic")
        del ballast
        qmove.restore(model)
        checks.expect(
            f"every byte is right after {name}", models.hashes(model) == before, "", "exact"
        )
        qmove.park(model)
    _swap_in_pieces(checks, sizes)
    _interrupts(checks, model, before)


def _leave(nbytes: int) -> list[torch.Tensor]:
    """Fills the card with blocks of 1 MiB but for `nbytes`, which lie in pieces of 64 MiB."""
    torch.cuda.empty_cache()
    blocks = []
    while True:
        try:
            blocks.append(torch.empty(MIB, dtype=torch.uint8, device="cuda:0"))
        except torch.OutOfMemoryError:
            break
    for start in range(0, len(blocks), 65):  # every 65th block stays
        for index in range(start, min(start + 64, len(blocks))):
            if nbytes > 0:
                blocks[index] = torch.empty(0)
                nbytes -= MIB
    torch.cuda.empty_cache()
    return blocks


def _swap_in_pieces(checks: Checks, sizes: Sizes) -> None:
    first, second = models.stack(sizes.model // 8), models.stack(sizes.model // 8)
    hashes = models.hashes(first), models.hashes(second)
    qmove.park(second)
    ballast = _leave(24 * MIB)
    try:
        qmove.swap(first, second)
        outcome = "swapped"
    except qmove.NotEnoughMemory as error:
        outcome = f"NotEnoughMemory: {error}".splitlines()[0]
    checks.figure("swap on a card in pieces", outcome)
    del ballast
    qmove.restore(first)
    qmove.restore(second)
    same = (models.hashes(first), models.hashes(second)) == hashes
    checks.expect("every byte of both is right after a swap in pieces", same, "", "swap", "exact")


def _interrupts(checks: Checks, model: torch.nn.Module, before: list[str]) -> None:
    if not hasattr(signal, "setitimer"):
        checks.skip("Ctrl-C", "this system has no interval timer")
        return
    interrupted = 0
    armed = False

    def interrupt(*_args: object) -> None:
        if armed:
            raise KeyboardInterrupt

    before_ours = signal.signal(signal.SIGINT, interrupt)
    moves: list[Callable[[object], object]] = [qmove.park, qmove.restore]
    for moment in range(10):
        qmove.restore(model)
        for move in moves:
            timer = threading.Timer(0.001 * (moment + 1), signal.raise_signal, [signal.SIGINT])
            timer.start()
            try:
                armed = True
                move(model)
                armed = False
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                armed = False
            timer.cancel()
            timer.join()
    signal.signal(signal.SIGINT, before_ours)
    checks.figure("moves that Ctrl-C stopped", f"{interrupted} of 20")
    qmove.restore(model)
    right = models.hashes(model) == before
    checks.expect("every byte is right after Ctrl-C at ten moments", right, "", "atomic", "exact")
