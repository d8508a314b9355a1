"""Where the system takes long to make huge pages, the rest of the block goes on with small ones."""

from __future__ import annotations

import logging
import mmap
import threading

import numpy
import pytest

from qmove_core import workers
from qmove_core.memory import arena, pages, pinning
from qmove_core.memory.blocks import FIRST_PIECES, PIECE
from tests.builders.arena import block_of, nothing

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.usefixtures("empty_arena"),
    pytest.mark.skipif(not hasattr(mmap, "MADV_NOHUGEPAGE"), reason="no huge pages here"),
]

STRIPES = PIECE // pages._STRIPE
PIECES = 4


class Clock:
    """In each thread a clock of its own, that only the touching of memory moves on: by what is set
    for the piece that the memory is of."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds_of_piece = [0.0] * PIECES
        self.address = 0  # of the block
        self.advised: list[tuple[int, int]] = []
        self._mine = threading.local()
        touch, advise = pages.touch, pages.advise

        def timed(memory: numpy.ndarray) -> None:
            touch(memory)
            piece = (memory.ctypes.data - self.address) // PIECE
            self._mine.now = self() + self.seconds_of_piece[piece] / STRIPES

        def noted(address: int, nbytes: int, advice: int) -> bool:
            if advice == mmap.MADV_NOHUGEPAGE:
                self.advised.append((address, nbytes))
            return advise(address, nbytes, advice)

        monkeypatch.setattr(pages, "clock", self)
        monkeypatch.setattr(pages, "touch", timed)
        monkeypatch.setattr(pages, "advise", noted)
        monkeypatch.setattr(workers, "COUNT", 4)
        monkeypatch.setattr(pinning, "_said", set())

    def __call__(self) -> float:
        return float(getattr(self._mine, "now", 0.0))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def lock_all(clock: Clock) -> tuple[int, int]:
    """Locks a block of four pieces; gives where it begins and its bytes."""
    (storage,) = arena.allocate([PIECES * PIECE], nothing)
    block = block_of(storage)
    clock.address = block.address
    assert block.pin(0, block.nbytes) and block.pinned_bytes == block.nbytes
    return block.address, block.nbytes


# Four threads that take this long together make 1 GB a second.
LIMIT = PIECE * 4 / pages.SLOW


@pytest.mark.parametrize("slow", range(FIRST_PIECES))
def test_after_a_slow_first_piece_the_rest_is_made_of_small_pages_and_one_line_says_so(
    slow: int, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.seconds_of_piece = [0.01] * PIECES
    clock.seconds_of_piece[slow] = LIMIT * 1.01
    with caplog.at_level(logging.INFO, "qmove"):
        address, nbytes = lock_all(clock)

    begin = (slow + 1) * PIECE
    assert clock.advised == [(address + begin, nbytes - begin)]
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "without huge pages" in record.getMessage()


def test_it_is_said_once_and_every_block_is_looked_at(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        clock.seconds_of_piece = [LIMIT * 2] * PIECES
        with caplog.at_level(logging.INFO, "qmove"):
            lock_all(clock)
        arena.trim(0)
    assert len(clock.advised) == 2 and len(caplog.records) == 1


@pytest.mark.parametrize(
    "seconds",
    [
        [LIMIT * 0.99] * PIECES,
        [0.0] * PIECES,
        [0.01, 0.01, LIMIT * 9, LIMIT * 9],  # by then the others are half way
    ],
    ids=["just fast enough", "at once", "slow later"],
)
def test_otherwise_huge_pages_stay(
    seconds: list[float], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    clock.seconds_of_piece = seconds
    with caplog.at_level(logging.INFO, "qmove"):
        lock_all(clock)
    assert clock.advised == [] and caplog.records == []
