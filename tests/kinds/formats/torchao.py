"""torchao: integer, fp8 and microscaling weights, each a wrapper subclass around plain tensors."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind, module_is_there


def quantized(config: Callable[[], Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchao.quantization import quantize_

        model = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).cuda())
        quantize_(model.requires_grad_(False), config())
        return model

    return build


def ao(name: str, **options: Any) -> Callable[[], Any]:
    def config() -> Any:
        import torchao.quantization

        return getattr(torchao.quantization, name)(**options)

    return config


def int8_per_group() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, PerGroup

    return Int8WeightOnlyConfig(granularity=PerGroup(32))


def fp8_per_row() -> Any:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())


def microscaled(**options: Any) -> Callable[[], Any]:
    def config() -> Any:
        from torchao.prototype.mx_formats import inference_workflow
        from torchao.quantization.quantize_.common import KernelPreference

        emulated = {"kernel_preference": KernelPreference.EMULATED}
        return inference_workflow.MXDynamicActivationMXWeightConfig(**options, **emulated)

    return config


def nvfp4(name: str) -> Callable[[], Any]:
    def config() -> Any:
        from torchao.prototype.mx_formats import inference_workflow

        return getattr(inference_workflow, name)()

    return config


def nf4() -> nn.Module:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).cuda()
    codes = to_nf4(layer.weight.data, block_size=64, scaler_block_size=64)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    return layer


def tinygemm() -> nn.Module:
    """The layout of tinygemm's kernel, with random codes: only CUDA can pack and use it."""
    from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import (
        Int4TilePackedTo4dTensor,
    )

    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16, device="cuda")
    shape = (WIDTH // 8, WIDTH // 128, 32, 4)
    codes = torch.randint(0, 2**31 - 1, shape, dtype=torch.int32).cuda()
    scales = torch.randn(WIDTH // 32, WIDTH, 2, dtype=torch.bfloat16).cuda()
    weight = Int4TilePackedTo4dTensor(codes, scales, [1, 32], torch.Size((WIDTH, WIDTH)))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def affine(layout: str) -> Callable[[], nn.Module]:
    """`AffineQuantizedTensor` around a `TensorImpl`, two wrappers deep, as releases until 0.16 have
    it."""

    def build() -> nn.Module:
        import torchao.dtypes as dtypes
        from torchao.quantization.quant_primitives import MappingType

        layer = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).cuda()
        if layout == "int8":
            weight = dtypes.to_affine_quantized_intx(
                layer.weight.data, MappingType.SYMMETRIC, (1, WIDTH), torch.int8
            )
        else:
            weight = dtypes.to_affine_quantized_floatx(
                layer.weight.data, (1, WIDTH), torch.float8_e4m3fn, _layout=dtypes.Float8Layout()
            )
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    return build


def _version() -> tuple[int, int]:
    if not module_is_there("torchao"):
        return (0, 0)
    major, minor, *_ = metadata.version("torchao").split(".")
    return int(major), int(minor)


IS_OLD = _version() < (0, 17)  # of the time before the classes that this file is written for
MISSING = (ImportError, NotImplementedError, AssertionError, AttributeError)


def kind(name: str, build: Callable[[], nn.Module], in_sample: bool = False, **more: Any) -> Kind:
    options: dict[str, Any] = {"cpu": "close", **more}
    if IS_OLD:  # what it lacks is not tried
        options["refuses"] = (*MISSING, TypeError, RuntimeError)
    return Kind(
        f"torchao {name}",
        build,
        dtype=torch.bfloat16,
        package="torchao",
        in_sample=in_sample,
        **options,
    )


KINDS = (
    kind("int8 weight-only", quantized(ao("Int8WeightOnlyConfig")), in_sample=True),
    kind("int8 weight-only, groups", quantized(int8_per_group)),
    kind("int8 dynamic", quantized(ao("Int8DynamicActivationInt8WeightConfig"))),
    kind("int4 weight-only", quantized(ao("IntxWeightOnlyConfig", weight_dtype=torch.int4))),
    kind("int2 weight-only", quantized(ao("IntxWeightOnlyConfig", weight_dtype=torch.int2))),
    kind(
        "int8 dynamic, int4 weight",
        quantized(ao("Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4)),
    ),
    kind(
        "int4 plain (mslk)",
        quantized(ao("Int4WeightOnlyConfig")),
        refuses=MISSING,
        cpu="refused",
    ),
    kind("int4 tinygemm", tinygemm, kernels="tinygemm's kernel is CUDA's alone", cpu="refused"),
    kind("fp8 weight-only", quantized(ao("Float8WeightOnlyConfig"))),
    kind("fp8 dynamic, rows", quantized(fp8_per_row)),
    kind("mxfp8", quantized(microscaled())),
    kind(
        "mxfp4",
        quantized(
            microscaled(
                activation_dtype=torch.float4_e2m1fn_x2, weight_dtype=torch.float4_e2m1fn_x2
            )
        ),
    ),
    kind("nvfp4 weight-only", quantized(nvfp4("NVFP4WeightOnlyConfig"))),
    kind(
        "nvfp4 dynamic",
        quantized(nvfp4("NVFP4DynamicActivationNVFP4WeightConfig")),
        refuses=MISSING,
    ),
    kind("nf4", nf4),
    kind("AQT int8", affine("int8"), refuses=MISSING),
    kind("AQT fp8", affine("fp8"), refuses=MISSING),
)
