"""Single layers of bitsandbytes in every format, and the values that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import nn

WIDTH = 128


def linear_8bit(**options: Any) -> Callable[[], nn.Module]:
    return lambda: bnb.nn.Linear8bitLt(WIDTH, 64, has_fp16_weights=False, **options)


def linear_4bit(
    cls: type[nn.Module] = bnb.nn.Linear4bit, **options: Any
) -> Callable[[], nn.Module]:
    return lambda: cls(WIDTH, 64, compute_dtype=torch.float16, **options)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "int8": linear_8bit(),
    "int8 with outliers": linear_8bit(threshold=6.0),
    "nf4 flat": linear_4bit(bnb.nn.LinearNF4, compress_statistics=False),
    "nf4 double": linear_4bit(bnb.nn.LinearNF4),
    "fp4 flat in bfloat16": linear_4bit(compress_statistics=False, quant_storage=torch.bfloat16),
    "fp4 double": linear_4bit(bnb.nn.LinearFP4, bias=False),
    "embedding int8": lambda: bnb.nn.Embedding8bit(50, WIDTH),
    "embedding nf4": lambda: bnb.nn.EmbeddingNF4(50, WIDTH),
}


every_layer = pytest.mark.parametrize("name", LAYERS)


def quantized(name: str, dtype: torch.dtype = torch.float16) -> nn.Sequential:
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype).eval().requires_grad_(False)
    layer.weight.data.normal_(0, 0.02)
    return nn.Sequential(layer.cuda())


def inputs(model: nn.Sequential, device: str, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    torch.manual_seed(1)
    if isinstance(model[0], nn.Embedding):
        return torch.arange(12, device=device).reshape(2, 6)
    return torch.randn(3, WIDTH).to(device, dtype)


def values(layer: nn.Module) -> torch.Tensor:
    """What a layer's codes and scales stand for, in float32 on the CPU, computed here and not by
    qmove."""
    weight: Any = layer.weight
    if weight.dtype == torch.int8:
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return weight.data.cpu().float() * scales.cpu().float()[:, None] / 127
    state = weight.quant_state
    dtype, state.dtype = state.dtype, torch.float32
    result = dequantize_4bit(weight.data, state).cpu()
    state.dtype = dtype
    return result
