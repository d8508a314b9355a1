"""Tensors of given sizes in bytes, no two alike."""

from __future__ import annotations

import torch

MIB = 1 << 20


# Of odd length, so that bytes which come to lie at another place show.
_PATTERN = torch.randint(
    0, 256, (MIB + 7,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def tensors(*sizes: int) -> list[torch.Tensor]:
    """Tensors of these many bytes, no two alike."""
    return [
        _PATTERN.roll(number).repeat(-(-size // MIB))[:size].to("cuda", copy=True)
        for number, size in enumerate(sizes)
    ]


def equal(model: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(
        torch.equal(tensor.cpu(), wanted) for tensor, wanted in zip(model, expected, strict=True)
    )


def on_host(model: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in model]
