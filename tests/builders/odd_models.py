"""Models with tensors of all kinds: every dtype, odd strides, shared storages, inference tensors,
two devices."""

from __future__ import annotations

import torch
from torch import nn

from tests.builders.models import layers

EVERY_DTYPE = [
    *(
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
]


def every_dtype() -> nn.Module:
    model = nn.Module()
    for dtype in EVERY_DTYPE:
        content = torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(0))
        model.register_buffer(f"as_{dtype}".replace("torch.", ""), content.to(dtype).cuda())
    return model


def odd_geometries() -> nn.Module:
    model = nn.Module()
    whole = torch.arange(120.0, device="cuda")
    model.register_buffer("whole", whole)
    model.register_buffer("slice", whole[7:40:3])
    model.register_buffer("transposed", whole.view(10, 12).t())
    model.register_buffer("expanded", whole[:1].expand(4, 4))
    model.register_buffer(
        "channels_last", torch.rand(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last)
    )
    model.register_buffer("scalar", torch.tensor(3.5, device="cuda"))
    model.register_buffer("empty", torch.empty(0, 7, device="cuda"))
    model.register_buffer("conjugated", torch.tensor([1 + 2j], device="cuda").conj())
    model.register_buffer("imaginary", torch.tensor([1 + 2j], device="cuda").conj().imag)
    return model


def tied() -> nn.Module:
    model = layers(3)
    model[2].weight = model[0].weight
    model[1].weight.data = model[0].weight.data
    return model


def inference_tensors() -> nn.Module:
    with torch.inference_mode():
        model = layers(2)
        model.view = model[0].weight[3]
    assert model[0].weight.is_inference()
    return model


def partly_on_the_host() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, device="cuda"), nn.Linear(8, 8)).requires_grad_(False)


BUILDERS = [every_dtype, odd_geometries, tied, inference_tensors, partly_on_the_host]
