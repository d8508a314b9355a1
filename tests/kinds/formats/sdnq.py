"""SDNQ: int8 and packed integers with low-rank corrections, fp8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def quantized(weights_dtype: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import sdnq

        model = nn.Sequential(nn.Linear(WIDTH, WIDTH).cuda())
        return sdnq.sdnq_post_load_quant(
            model,
            weights_dtype=weights_dtype,
            torch_dtype=torch.float32,
            quantization_device="cuda",
            return_device="cuda",
            **options,
        )

    return build


def kind(name: str, build: Callable[[], nn.Module]) -> Kind:
    return Kind(f"SDNQ {name}", build, package="sdnq", cpu="close")


KINDS = (
    kind("int8", quantized("int8")),
    kind("uint4", quantized("uint4", group_size=32)),
    kind("uint4 with svd", quantized("uint4", group_size=32, use_svd=True, svd_rank=8)),
    kind("int2", quantized("int2", group_size=32)),
    kind("fp8", quantized("float8_e4m3fn")),
    kind("int8, quantized products", quantized("int8", use_quantized_matmul=True)),
)
