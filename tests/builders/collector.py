"""For tests that ask the garbage collector who holds what."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
