"""How exact products are computed on each device, found out by trying; and which failures count.

A digest only makes moves cheaper: nothing fails for it, but for what a device reports of work that
was queued before.
"""

from __future__ import annotations

import logging

import torch

from ..interrupts import interrupts_deferred
from .digest_tree import (
    GROUP,
    PIECE,
    ROW,
    FloatProducts,
    IntProducts,
    Products,
    matrices,
    random_bytes,
)
from .gathering import LEAST_STAGING, is_shortage, queue

log = logging.getLogger("qmove")


@interrupts_deferred()
def available(device: torch.device) -> bool:
    """Whether digests can be computed on `device`.

    The first time it is tried out, on pieces of all kinds.
    """
    try:
        return products_on(device) is not None
    except Exception as error:
        note_failure(device, error)
        return False


_chosen: dict[torch.device, type[Products] | None] = {}
_failed: set[tuple[torch.device, type[Products]]] = set()  # ways that no longer are to be used
_said: set[tuple[torch.device, str]] = set()


def products_on(device: torch.device) -> type[Products] | None:
    """How exact products are computed on `device`: the fastest way that stands the test.

    Raises:
        RuntimeError: a shortage, or an error of work that was queued before. Nothing is concluded
            from those.
    """
    if device not in _chosen:
        _chosen[device] = _fastest_exact(device)
    return _chosen[device]


def _fastest_exact(device: torch.device) -> type[Products] | None:
    if device.type == "cpu":
        return FloatProducts
    ways: list[type[Products]] = (
        [IntProducts, FloatProducts] if hasattr(torch, "_int_mm") else [FloatProducts]
    )
    expected = _sample(FloatProducts, torch.device("cpu"))
    failure: RuntimeError | None = None
    for way in ways:
        if (device, way) in _failed:
            continue
        try:
            if _sample(way, device) == expected:
                return way
            reason = "wrong results"
        except RuntimeError as error:
            if is_shortage(error) or is_of_earlier_work(error):
                raise
            failure, reason = error, str(error).partition("\n")[0]
        log.info("digests on %s do not use %s: %s", device, way.__name__, reason)
    if failure is not None:
        raise failure
    return None


def _sample(way: type[Products], device: torch.device) -> bytes:
    """The products of pieces of all kinds, of random bytes and of those whose products are the
    largest. Takes little memory, as it may run when the device is nearly full."""
    with torch.no_grad(), torch.inference_mode(False):
        content = random_bytes(PIECE, device)
        largest = torch.where(matrices(device) < 0, -128, 127).to(torch.int8)
        contents = [content[: rows * ROW] for rows in _SAMPLED] + [
            largest[: len(largest) // ROW * ROW]
        ]
        parts = [part.view(torch.uint8) for part in contents]
        out, places = queue(way, parts, device, LEAST_STAGING)
        return out[: sum(map(len, places))].cpu().numpy().tobytes()


_SAMPLED = (1, GROUP - 1, GROUP, GROUP + 1, PIECE // ROW)  # rows


class Inexact(Exception):
    """A device of which no way of multiplying stood the test."""


def is_of_earlier_work(error: Exception) -> bool:
    """Whether a device reports what was queued before.

    Since torch 2.8 this has a class of its own; until then only the words, which errors of cuBLAS
    share.
    """
    if not isinstance(error, RuntimeError) or is_shortage(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None:
        return isinstance(error, accelerator_error)
    text = str(error)
    return text.startswith(("CUDA error", "HIP error")) and "BLAS_STATUS" not in text


def note_failure(device: torch.device, error: Exception) -> None:
    """Says once why there is no digest. Raises what has nothing to do with digests."""
    if is_of_earlier_work(error):
        raise error
    fails_for_good = not is_shortage(error) and not isinstance(error, Inexact)
    if fails_for_good and _chosen.get(device) is IntProducts:
        # A library that lacks a shape, for example: the same digests can be had in another way.
        _failed.add((device, IntProducts))
        del _chosen[device]
    error.__traceback__ = error.__context__ = None  # whoever keeps the error keeps no memory
    reason = str(error).partition("\n")[0]
    if (device, reason) not in _said:
        _said.add((device, reason))
        log.info("no digests on %s this time, so more is copied: %s", device, reason)
