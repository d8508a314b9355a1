"""diffusers' own fp8 and nvfp4 layers for Black Forest Labs' checkpoints."""

from __future__ import annotations

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def fp8() -> nn.Module:
    from diffusers.quantizers.bfl.utils import BFLFP8RLinear, quantize_fp8r

    layer = BFLFP8RLinear(WIDTH, WIDTH, compute_dtype=torch.float32)
    codes, scale = quantize_fp8r(torch.randn(WIDTH, WIDTH))
    layer.weight.data, layer.weight_scale = codes, scale
    return layer.cuda()


def nvfp4() -> nn.Module:
    from diffusers.quantizers.bfl.utils import BFLNVFP4Linear, quantize_nvfp4

    layer = BFLNVFP4Linear(WIDTH, WIDTH, compute_dtype=torch.float32)
    codes, scale, scale_2 = quantize_nvfp4(torch.randn(WIDTH, WIDTH))
    layer.weight.data, layer.weight_scale, layer.weight_scale_2 = codes, scale, scale_2
    layer.input_scale = torch.tensor(0.5)
    return layer.cuda()


def bundled(name: str) -> nn.Module:
    """The parameter that a checkpoint is loaded into, with its scales as attributes."""
    from diffusers.quantizers.bfl import utils

    class Bundled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            codes, *scales = getattr(utils, f"quantize_{name}")(torch.randn(WIDTH, WIDTH))
            on_device = [scale.cuda() for scale in scales]
            self.weight = utils.BFLQuantizedParameter(codes.cuda(), name, *on_device)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, utils._dequantize_weight(self.weight).to(x.dtype))

    return Bundled()


def kind(name: str, build: object, cpu: str = "close") -> Kind:
    return Kind(f"diffusers bfl {name}", build, package="diffusers", cpu=cpu)  # type: ignore[arg-type]


KINDS = (
    kind("fp8", fp8, cpu="runs"),
    kind("nvfp4", nvfp4),
    kind("fp8 parameter with scales", lambda: bundled("fp8r")),
    kind("nvfp4 parameter with scales", lambda: bundled("nvfp4")),
)
