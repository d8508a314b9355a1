"""Python's garbage collector: held back while qmove makes many objects that live until a move ends,
and asked for all objects of the process.

A move of 10,000 tensors makes about 100,000 of them. Whenever the live objects have grown by a
quarter, the collector looks through the whole process. With PyTorch loaded this takes 100 ms, and
there is nothing to find.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("qmove")


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


def all_objects() -> list[Any]:
    """Every object that the garbage collector manages. Drop the list soon: it keeps them alive.

    `gc.freeze()` hides objects from `gc.get_objects` and `gc.get_referrers`: a tensor that shares
    its storage with a parked model would stay behind on the device. So what is frozen is given back
    to the collector, which costs it time and changes nothing else. It is not frozen again:
    `gc.freeze()` would take what was made since then along, and no collection would ever free that.
    """
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()
        log.info(
            "%d objects that gc.freeze() had hidden are with the garbage collector again, because "
            "qmove looks for who else holds a model's bytes; call gc.freeze() again after the move "
            "if its time matters.",
            frozen,
        )
    return gc.get_objects()
