"""For tests that ask the garbage collector who holds what."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_freeze_count = gc.get_freeze_count


def set_everything_aside() -> None:
    """Freezes what lives now. qmove does not see that, or it would give all of it back to the
    collector (`qmove_core.collector.all_objects`), and every test would take seconds longer."""
    gc.collect()
    gc.freeze()
    gc.get_freeze_count = lambda: 0


@contextmanager
def everything_frozen() -> Iterator[None]:
    """Inside, the program has frozen what lives, as `gc.freeze()` does outside of the tests."""
    gc.collect()
    gc.freeze()
    gc.get_freeze_count = _freeze_count
    try:
        yield
    finally:
        set_everything_aside()


@contextmanager
def everything_listed() -> Iterator[None]:
    """Inside, the collector lists imported modules too; the tests' conftest has set them aside.

    What lives at the end is set aside as well, so keep it short, and free of garbage in cycles.
    """
    gc.unfreeze()
    try:
        yield
    finally:
        gc.freeze()
