"""HQQ: codes in a parameter that is no part of `parameters()` of old, scales in a plain dict."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def quantized(bits: int, axis: int = 1) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        return HQQLinear(
            nn.Linear(WIDTH, WIDTH),
            BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis),
            compute_dtype=torch.float32,
            device="cuda",
        )

    return build


KINDS = tuple(
    Kind(f"HQQ {bits} bits, axis {axis}", quantized(bits, axis), package="hqq", cpu="close")
    for bits, axis in ((8, 1), (4, 1), (4, 0), (3, 1), (2, 1), (1, 1))
)
