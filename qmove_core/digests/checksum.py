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


Sums = list[tuple[int, int, int]]  # for each piece that is touched: its number, and its two sums


class Checksum:
    """The checksum of `nbytes` bytes that come one after the other."""

    def __init__(self, nbytes: int) -> None:
        self._of_whole_pieces = nbytes
        self._last = (0, 0, 0)  # the piece that may go on, as in `Sums`
        self._is_begun = False

    @property
    def value(self) -> int:
        """Of what came by now."""
        return self._with_last() if self._is_begun else self._of_whole_pieces

    def update(self, content: torch.Tensor) -> Checksum:
        """Takes more bytes in, flat uint8 on the host; whole MiB, but for the last ones."""
        with torch.no_grad(), torch.inference_mode(False):
            first = self._last[0] + 1 if self._is_begun else 0
            pieces = _as_words(content).split(_WORDS)
            self.add([(first + i, *sums) for i, sums in enumerate(_sums_in_order(pieces))])
        return self

    def add(self, sums: Sums) -> None:
        """Takes more bytes in, by what `sums_of` says of them."""
        for number, of_words, of_halves in sums:
            if self._is_begun and number == self._last[0]:
                _number, words, halves = self._last
                self._last = number, _as_int64(words + of_words), _as_int64(halves + of_halves)
                continue
            self._of_whole_pieces, self._is_begun = self.value, True
            self._last = number, of_words, of_halves

    def _with_last(self) -> int:
        _number, of_words, of_halves = self._last
        return (self._of_whole_pieces * _STEP + (of_words << 64) + of_halves) % _MODULUS


def sums_of(content: torch.Tensor, at: int) -> Sums:
    """What `Checksum.add` takes of bytes (flat uint8 on the host) that begin `at` bytes, a multiple
    of 8, behind the first ones. By this thread alone: others may do it for what lies before."""
    found = []
    with torch.no_grad(), torch.inference_mode(False):
        words, done, begin = _as_words(content), 0, at // 8
        while done < len(words):
            number, first = divmod(begin + done, _WORDS)
            piece = words[done : done + _WORDS - first]
            found.append((number, *_sums_of(piece, first)))
            done += len(piece)
    return found


def _as_int64(number: int) -> int:
    """Modulo 2^64, as the processor adds."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _sums_of(piece: torch.Tensor, first: int = 0) -> tuple[int, int]:
    of_words, of_halves = _factors()
    place = slice(first, first + piece.numel())
    return (
        int(torch.dot(piece, of_words[place])),
        int(torch.dot(piece >> 32, of_halves[place])),
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
    # Words must lie on a multiple of their size, in memory and in their storage.
    if missing or content.storage_offset() % 8 or content.data_ptr() % 8:
        content = torch.cat([content, content.new_zeros(missing)])
    return content.view(torch.int64)


@functools.cache
def _factors() -> tuple[torch.Tensor, torch.Tensor]:
    # A checksum may be in a file: so the numbers are those of a generator that stays as it is.
    numbers = numpy.random.PCG64(0).random_raw(2 * _WORDS).view(numpy.int64)
    with torch.inference_mode(False):
        first, second = torch.from_numpy(numbers).split(_WORDS)
    return first, second
