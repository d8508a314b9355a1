"""A checksum of a tensor's bytes on the host, as fast as they can be read there, to tell whether a
weight was changed.

For weights that were just read on the host, where `digest.py`'s products, made for GPUs, are
several times slower. Two sums modulo 2^64: of the 8-byte words, and of their upper halves, each
times random numbers that differ from place to place. A difference in a lower half is divisible by
2^31 at most, so that the first sum misses it with odds of at most 2^-33; one in upper halves only
is missed by the second with the same odds. (The first alone would miss every second change of two
signs.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy
import torch

from .. import workers

_WORDS = 1 << 16  # of 8 bytes: 512 KiB, which stays in the processor's cache
_MODULUS = 1 << 128
_STEP = 0x9E3779B97F4A7C15F39CC0605CEDC835  # odd, so that multiplying by it loses nothing
_CHUNK = 64 << 20  # bytes copied to the host at a time


def checksum_of(tensor: torch.Tensor) -> int:
    """Of the bytes that `tensor` shows, in the order of its elements.

    On a device they are copied in pieces.
    """
    checksum = Checksum(tensor.numel() * tensor.itemsize)
    with torch.no_grad(), torch.inference_mode(False):
        for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(_CHUNK):
            checksum.update(chunk.cpu())
    return checksum.value


class Checksum:
    """The checksum of `nbytes` bytes that come one after the other."""

    def __init__(self, nbytes: int) -> None:
        self.value = nbytes

    def update(self, content: torch.Tensor) -> Checksum:
        """Takes more bytes in, flat uint8 on the host; whole MiB, but for the last ones."""
        with torch.no_grad(), torch.inference_mode(False):
            for sums in _sums_in_order(_as_words(content).split(_WORDS)):
                self.value = (self.value * _STEP + (sums[0] << 64) + sums[1]) % _MODULUS
        return self


def _sums_of(piece: torch.Tensor) -> tuple[int, int]:
    of_words, of_halves = _factors()
    count = piece.numel()
    return (
        int(torch.dot(piece, of_words[:count])),
        int(torch.dot(piece >> 32, of_halves[:count])),
    )


def _sums_in_order(pieces: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Of each piece, by several threads where that is worth it: one alone is slower than a fast
    disk."""
    if len(pieces) < _WORTH_THREADS:
        yield from map(_sums_of, pieces)
        return
    _factors()  # made once, and not by each of them
    futures = [workers.submit(_sums_of, piece) for piece in pieces]
    for piece, future in zip(pieces, futures, strict=True):
        yield _sums_of(piece) if future is None else future.result()


_WORTH_THREADS = 4


def _as_words(content: torch.Tensor) -> torch.Tensor:
    missing = -content.numel() % 8
    if missing or content.storage_offset() % 8:  # words must lie on a multiple of their size
        content = torch.cat([content, content.new_zeros(missing)])
    return content.view(torch.int64)


@functools.cache
def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    # A checksum may be in a file: so the numbers are those of a generator that stays as it is.
    numbers = numpy.random.PCG64(0).random_raw(2 * _WORDS).view(numpy.int64)
    with torch.inference_mode(False):
        first, second = torch.from_numpy(numbers).split(_WORDS)
    return first, second
