"""Resident models with mirrors: host copies that stay after a restore."""

from __future__ import annotations

import torch
from torch import nn

import qmove_core as qmove
from qmove_core.digests import choosing
from qmove_core.digests.digest_tree import PIECE, PRODUCT, SPARE
from qmove_core.memory import arena
from tests.builders.models import layers

WIDTH = 512
WEIGHT, BIAS = WIDTH * WIDTH * 4, WIDTH * 4  # bytes
MODEL = 4 * (WEIGHT + BIAS)  # of `mirrored()`


def digest_bytes(model: object) -> int:
    """What reading the digests of all storages on accelerators brings over the link, at most."""
    assert choosing.available(torch.device("cuda", 0))  # tried out before, which is read too
    away = [holding for holding in qmove.inventory(model).holdings if holding.device.type != "cpu"]
    return PRODUCT * (SPARE + sum(-(-holding.nbytes // PIECE) for holding in away))


def round_trip(model: object) -> None:
    qmove.park(model)
    qmove.restore(model)


def mirrored(count: int = 4, width: int = WIDTH) -> nn.Sequential:
    """A resident model with mirrors, of `2 * count` storages."""
    model = layers(count, width=width)
    round_trip(model)
    return model


def ones(width: int = WIDTH) -> torch.Tensor:
    return torch.ones(1, width, device="cuda")


def held() -> int:
    """Bytes of RAM that qmove has from the system."""
    return arena.bytes_in_use() + arena.spare_bytes()
