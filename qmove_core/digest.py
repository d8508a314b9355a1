"""A checksum of a tensor's bytes, to tell whether they were changed.

Versions of tensors cannot tell: writes through `.data` do not count. Sums modulo 2^64 of the bytes, taken as words, times odd
factors that differ from place to place: one changed word always changes the digest, several at once all but always.
"""

from __future__ import annotations

import functools

import torch

_WORDS = 1 << 17  # of 8 bytes: 1 MiB, which stays in the processor's cache
_MODULUS = 1 << 64
_STEP = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing
_CHUNK = 64 << 20  # bytes copied to the host at a time


def digest_of(tensor: torch.Tensor) -> int:
    """The digest of the bytes that `tensor` shows, in the order of its elements. On a device they are copied in pieces."""
    digest = tensor.numel() * tensor.itemsize
    with torch.no_grad(), torch.inference_mode(False):
        for chunk in tensor.detach().reshape(-1).view(torch.uint8).split(_CHUNK):
            words = _as_words(chunk.cpu())
            for piece in words.split(_WORDS):
                digest = (digest * _STEP + int(torch.dot(piece, _factors()[: piece.numel()]))) % _MODULUS
    return digest


def _as_words(content: torch.Tensor) -> torch.Tensor:
    missing = -content.numel() % 8
    if missing or content.storage_offset() % 8:  # words must lie on a multiple of their size
        content = torch.cat([content, content.new_zeros(missing)])
    return content.view(torch.int64)


@functools.cache
def _factors() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**62), 2**62, (_WORDS,), generator=generator) * 2 + 1
