"""Proves with digests that what arrived is what was sent (`qmove.configure(verify=True)`).

Weights that were rightly changed while the model was parked, by a LoRA merged on the CPU for
example, have another digest than the one noted when they were parked. So before a difference
counts, the bytes on the host are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .. import homes
from ..actions import Action
from ..digests.digest import Digest, digest_storages
from ..errors import CorruptedCopy
from ..memory import mirrors
from .moves import StorageMove


def prove(action: Action, moves: Sequence[StorageMove]) -> bool:
    """Compares what was sent with what arrived, before the commit.

    Returns:
        Whether every storage was proved; False where a device could not compute a digest.

    Raises:
        CorruptedCopy: bytes differ; it names their tensors.
    """
    different: list[str] = []
    all_proved = True
    for move in moves:
        assert move.target is not None
        is_on_host = move.source.device.type == "cpu"
        here, there = (move.target, move.source) if is_on_host else (move.source, move.target)
        found = move.digest if move.digest is not None else _digest_of(here)
        origin = homes.origin_of(move.source)
        if found is not None and origin is not None and found == origin.digest:
            continue  # as it was when it was parked
        expected = _digest_of(there)
        if found is None or expected is None:
            all_proved = False
        elif found != expected:
            different.append(move.holding.name)
    if different:
        raise CorruptedCopy(action, different)
    return all_proved


def _digest_of(storage: torch.UntypedStorage) -> Digest | None:
    if storage.device.type == "cpu":
        return digest_storages([storage])[0]
    return mirrors.current_digests([storage])[0]
