"""Holds back Python's garbage collector while qmove makes many objects that live until a move ends.

A move of 10,000 tensors makes about 100,000 of them. Whenever the live objects have grown by a
quarter, the collector looks through the whole process. With PyTorch loaded this takes 100 ms, and
there is nothing to find.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_deferred() -> Iterator[None]:
    """Starts no automatic collection in the body. May be nested, and entered by several threads.

    Not for a body that waits: the garbage of other threads stays for as long.
    """
    was_enabled = gc.isenabled()
    try:
        try:
            gc.disable()
            yield
        finally:
            if was_enabled:
                gc.enable()
    finally:  # once more: a Ctrl-C in the first one must not switch the collector off for good
        if was_enabled:
            gc.enable()
