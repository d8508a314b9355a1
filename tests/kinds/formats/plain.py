"""Weights without a quantization, in every floating-point dtype; fp8 with its scales in attributes."""

from __future__ import annotations

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def linear(dtype: torch.dtype) -> nn.Module:
    return nn.Linear(WIDTH, WIDTH, dtype=dtype, device="cpu").cuda()


class CastLinear(nn.Module):
    """An fp8 weight that is cast to the input's dtype at each use, as ComfyUI loads fp8 files."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH).to(dtype).cuda()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH).cuda(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class ScaledLinear(CastLinear):
    """With `scale_weight` and `scale_input` as plain attributes, which no `named_buffers` lists."""

    def __init__(self) -> None:
        super().__init__(torch.float8_e4m3fn)
        self.scale_weight = torch.tensor(0.5).cuda()
        self.scales = {"input": torch.tensor([2.0]).cuda()}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype) * self.scale_weight.to(x.dtype)
        return nn.functional.linear(x / self.scales["input"], weight, self.bias.to(x.dtype))


KINDS = (
    *(
        Kind(
            f"plain {name}",
            lambda dtype=dtype: linear(dtype),
            dtype=dtype,
            cpu="close",
            keeps_dtype=False,
            in_sample=dtype is torch.float32,
        )
        for name, dtype in (
            ("fp32", torch.float32),
            ("fp16", torch.float16),
            ("bf16", torch.bfloat16),
        )
    ),
    Kind("plain fp8 e4m3", lambda: CastLinear(torch.float8_e4m3fn), in_sample=True),
    Kind("plain fp8 e5m2", lambda: CastLinear(torch.float8_e5m2)),
    Kind("scaled fp8, scales in attributes", ScaledLinear, in_sample=True),
)
