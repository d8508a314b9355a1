"""comfy-kitchen's `QuantizedTensor`, in each of its layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.builders.device import SIMULATED
from tests.kinds.kind import Kind

WIDE = 256  # ConvRot rotates groups of 256 values


def layer_of(weight: Any) -> nn.Module:
    layer = nn.Linear(WIDE, WIDE, dtype=torch.bfloat16, device="cuda")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def without_cuda_kernels() -> None:
    """Its kernels for CUDA call the driver, which the simulated GPU has not; those in Python do."""
    if SIMULATED:
        from comfy_kitchen.registry import registry

        registry.disable("cuda")


def quantized(layout: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        without_cuda_kernels()
        from comfy_kitchen.tensor import QuantizedTensor

        weight = torch.randn(WIDE, WIDE, dtype=torch.bfloat16) * 0.02
        return layer_of(QuantizedTensor.from_float(weight.cuda(), layout, **options))

    return build


def svdquant() -> nn.Module:
    """Its codes come from a calibration; here they are random, in the shapes that the layout has."""
    without_cuda_kernels()
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreSVDQuantW4A4Layout

    def some(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.bfloat16) * 0.02).cuda()

    codes = torch.randint(-128, 127, (WIDE, WIDE // 2), dtype=torch.int8).cuda()
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=some(WIDE // 64, WIDE),
        orig_dtype=torch.bfloat16,
        orig_shape=(WIDE, WIDE),
        proj_down=some(WIDE, 16),
        proj_up=some(WIDE, 16),
        smooth_factor=some(WIDE).abs() + 1,
    )
    return layer_of(QuantizedTensor(codes, "TensorCoreSVDQuantW4A4Layout", params))


def awq() -> nn.Module:
    without_cuda_kernels()
    from comfy_kitchen.tensor import QuantizedTensor, TensorCoreAWQW4A16Layout

    codes = torch.randint(-128, 127, (WIDE, WIDE // 2), dtype=torch.int8).cuda()
    scales = (torch.rand(WIDE // 64, WIDE, dtype=torch.bfloat16) * 0.02).cuda()
    params = TensorCoreAWQW4A16Layout.Params(
        scale=scales, orig_dtype=torch.bfloat16, orig_shape=(WIDE, WIDE), zeros=scales * 8
    )
    return layer_of(QuantizedTensor(codes, "TensorCoreAWQW4A16Layout", params))


def kind(name: str, build: Callable[[], nn.Module], **options: Any) -> Kind:
    settings: dict[str, Any] = {"cpu": "close", **options}
    return Kind(
        f"comfy-kitchen {name}",
        build,
        inside=WIDE,
        outside=WIDE,
        dtype=torch.bfloat16,
        package="comfy-kitchen",
        **settings,
    )


KINDS = (
    kind("fp8", quantized("TensorCoreFP8Layout")),
    kind("int8", quantized("TensorWiseINT8Layout", per_channel=True)),
    kind("int8 ConvRot", quantized("TensorWiseINT8Layout", per_channel=True, convrot=True)),
    kind("w4a4 ConvRot", quantized("TensorCoreConvRotW4A4Layout")),
    kind("w4a8", quantized("AsymW4A8Int8Layout")),
    kind("mxfp8", quantized("TensorCoreMXFP8Layout")),
    kind("nvfp4", quantized("TensorCoreNVFP4Layout")),
    kind("svdquant w4a4", svdquant, cpu="runs"),
    kind("AWQ w4a16", awq),
)
