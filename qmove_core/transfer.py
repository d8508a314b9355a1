"""Copies whole storages from device to device, as bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from . import devices
from .rebinding import as_bytes

Progress = Callable[
    [int, int], None
]  # bytes done, bytes in all; whatever it raises stops the move, which is then rolled back

CHUNK = 256 << 20  # bytes copied between two calls of a progress callback: often enough to show and to interrupt


def copy_storages(
    pairs: Sequence[tuple[torch.UntypedStorage, torch.UntypedStorage]], progress: Progress | None = None
) -> int:
    """Copies each (source, target) pair, which have equal sizes, and returns when every byte has arrived.

    Returns:
        The bytes copied.
    """
    involved = {storage.device for pair in pairs for storage in pair}
    devices.synchronize(involved)  # a kernel on any stream may still be writing the source
    total, done = sum(source.nbytes() for source, _target in pairs), 0
    with torch.no_grad(), torch.inference_mode(False):
        for source, target in pairs:
            from_, to = as_bytes(source), as_bytes(target)
            for start in range(0, source.nbytes(), CHUNK):
                copied = to[start : start + CHUNK].copy_(from_[start : start + CHUNK]).numel()
                done += copied
                if progress is not None:
                    progress(done, total)
    devices.synchronize(involved)
    return done
