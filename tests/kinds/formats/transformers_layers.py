"""transformers' own quantized layers, as far as they can be built here. Where their kernels come
from its hub the bytes alone are checked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind

HUB = "its kernels come from transformers' hub, for CUDA"


def fp8_blocks() -> nn.Module:
    from transformers.integrations.finegrained_fp8 import FP8Linear

    layer = FP8Linear(WIDTH, WIDTH, block_size=(128, 128))
    layer.weight.data = torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand_like(layer.weight_scale_inv)
    return layer.cuda()


def fbgemm_fp8() -> nn.Module:
    from transformers.integrations.fbgemm_fp8 import FbgemmFp8Linear

    layer = FbgemmFp8Linear(WIDTH, WIDTH, bias=True)
    layer.weight.data = torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn)
    return layer.cuda()


def mxfp4_experts() -> nn.Module:
    """As loaded, before the kernels swizzle it."""
    from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

    config: Any = SimpleNamespace(
        num_local_experts=2, intermediate_size=64, hidden_size=WIDTH, swiglu_limit=7.0
    )
    return Mxfp4GptOssExperts(config).cuda()


class TritonTensor:
    """As triton_kernels has it (no distribution for a machine without CUDA): no tensor, but
    objects with tensors in `storage.data`, in plain attributes of the experts."""

    def __init__(self, data: torch.Tensor) -> None:
        self.storage = SimpleNamespace(data=data, layout=SimpleNamespace(name="swizzled"))
        self.shape = list(data.shape)


def mxfp4_swizzled() -> nn.Module:
    """As it is after loading: transformers takes the parameters out and sets objects instead."""
    experts = mxfp4_experts()
    for name in ("gate_up_proj", "down_proj"):
        codes = getattr(experts, name).data
        del experts._parameters[name]
        setattr(experts, name, TritonTensor(codes))
        scales = torch.randint(0, 255, (2, WIDTH, 4), dtype=torch.uint8).cuda()
        config = SimpleNamespace(weight_scale=TritonTensor(scales), flex_ctx=SimpleNamespace())
        setattr(experts, f"{name}_precision_config", config)
    return experts


def nvfp4() -> nn.Module:
    from transformers.integrations.nvfp4 import NVFP4Linear

    return NVFP4Linear(WIDTH, WIDTH).cuda()


def bitnet() -> nn.Module:
    from transformers.integrations.bitnet import BitLinear

    layer = BitLinear(WIDTH, WIDTH, bias=False, dtype=torch.float32)
    layer.weight = torch.randint(0, 255, layer.weight.shape, dtype=torch.uint8)
    layer.weight_scale = torch.tensor([0.5])
    return layer.cuda()


def absent(name: str, why: str) -> Kind:
    def build() -> nn.Module:
        pytest.skip(why)

    return Kind(name, build)


def kind(name: str, build: Callable[[], nn.Module], kernels: str = HUB, **options: Any) -> Kind:
    settings: dict[str, Any] = {"cpu": "bytes" if kernels else "close", **options}
    return Kind(f"transformers {name}", build, package="transformers", kernels=kernels, **settings)


KINDS = (
    kind("fp8 blocks", fp8_blocks),
    kind("fbgemm fp8", fbgemm_fp8),
    kind("mxfp4 as loaded", mxfp4_experts),
    kind("mxfp4 swizzled", mxfp4_swizzled, keeps_dtype=False),
    kind("nvfp4", nvfp4, refuses=(ImportError,)),
    kind("bitnet", bitnet, kernels=""),
    absent(
        "transformers sinq",
        "sinq's wheel has a sitecustomize.py, which patches transformers in every Python of its "
        "environment: not installed",
    ),
    absent(
        "transformers fouroversix",
        "fouroversix has no wheel, and its build fails where torch is not in it: not installed",
    ),
    absent(
        "transformers quark",
        "amd-quark requires onnx, pandas, pyarrow and 20 more: not installed",
    ),
    absent(
        "nunchaku",
        "what the package index has under the name of nunchaku is something else; the wheels of the "
        "library are for CUDA. Its manner is tried as weights in C++",
    ),
)
