"""Proves with digests that the bytes that arrived are the bytes that were sent (`qmove.configure(verify=True)`).

Weights that somebody rightly changed while the model was parked, a LoRA merged on the CPU for example, have another digest than
the one noted when they were parked. So before a difference counts, the host's bytes themselves are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .. import homes
from ..actions import Action
from ..digests.digest import Digest, digest_storages
from ..errors import CorruptedCopy
from ..memory import mirrors

if TYPE_CHECKING:
    from .transaction import Step


def prove(
    action: Action,
    steps: Sequence[Step],
    sources: Sequence[torch.UntypedStorage],
    targets: Sequence[torch.UntypedStorage | None],
    digests: Sequence[Digest | None],
) -> bool:
    """Compares what was sent with what arrived.

    Args:
        digests: of the bytes on the accelerator, where one was taken: before a way out, after a way in.

    Returns:
        Whether every storage was proved; False where a device had no memory left to compute a digest.

    Raises:
        CorruptedCopy: bytes differ; it names their tensors.
    """
    different: list[str] = []
    unproved = 0
    for step, source, target, digest in zip(steps, sources, targets, digests, strict=True):
        assert target is not None
        here, there = (target, source) if source.device.type == "cpu" else (source, target)
        found = digest if digest is not None else _digest_of(here)
        origin = homes.origin_of(source)
        if found is not None and origin is not None and found == origin.digest:
            continue  # as it was when it was parked
        expected = _digest_of(there)
        if found is None or expected is None:
            unproved += 1
        elif found != expected:
            different.append(step.holding.name)
    if different:
        raise CorruptedCopy(action, different)
    return unproved == 0


def _digest_of(storage: torch.UntypedStorage) -> Digest | None:
    if storage.device.type == "cpu":
        return digest_storages([storage])[0]
    return mirrors.current_digests([storage])[0]
