"""One small model in every format and at every place: what is tried on one is tried on all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.builders.models import torchao_layers
from tests.builders.quantized_layers import quantized


class Model(nn.Module):
    """A base layer of some format, and plain ones around it."""

    def __init__(self, base: nn.Module, inside: int, outside: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(inside, inside, dtype=dtype)
        self.base = base
        self.last = nn.Linear(outside, outside, dtype=dtype)
        self.spare = nn.Linear(4, 4, dtype=dtype)
        self.register_buffer("scale", torch.full((outside,), 2.0, dtype=dtype))
        self.inside, self.dtype = inside, dtype
        self.requires_grad_(False).cuda()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.base(self.first(x))) * self.scale


def plain() -> Model:
    torch.manual_seed(1)
    return Model(nn.Linear(16, 16), 16, 16, torch.float32)


def tied() -> Model:
    model = plain()
    model.last.weight = model.first.weight
    return model


def torchao() -> Model:
    layer = torchao_layers("int8")[0]
    return Model(layer, layer.in_features, layer.out_features, next(iter(layer.parameters())).dtype)


def dispatched() -> Any:
    from accelerate import dispatch_model

    return dispatch_model(plain(), {"": 0}, force_hooks=True)


def dispatched_to_two() -> Any:
    from accelerate import dispatch_model

    places = {"first": 0, "base": 1, "last": 0, "spare": 1, "scale": 0}
    return dispatch_model(plain(), places, force_hooks=True)


MODELS: dict[str, Callable[[], Model]] = {
    "plain": plain,
    "tied": tied,
    "int8": lambda: Model(quantized("int8")[0], 128, 64, torch.float16),
    "nf4": lambda: Model(quantized("nf4 double")[0], 128, 64, torch.float16),
    "torchao": torchao,
    "dispatched": dispatched,
    "dispatched to two": dispatched_to_two,
}


def pipeline() -> Any:
    """A pipeline of diffusers: an encoder, and a `denoiser` that shares a weight with it."""
    from diffusers import DiffusionPipeline

    class Pipeline(DiffusionPipeline):
        def __init__(self, encoder: nn.Module, denoiser: Model) -> None:
            super().__init__()
            self.register_modules(encoder=encoder, denoiser=denoiser)

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.denoiser(self.encoder(x.to(self._execution_device)))

    denoiser, encoder = plain(), nn.Linear(16, 16, bias=False)
    encoder.weight = denoiser.first.weight
    return Pipeline(encoder, denoiser)


def model_in(whole: Any) -> Model:
    """The model of a pipeline, or the model itself."""
    return getattr(whole, "denoiser", whole)


def x_of(model: Model) -> torch.Tensor:
    torch.manual_seed(2)
    return torch.randn(3, model.inside).to("cuda", model.dtype)


def dense(layer: nn.Module) -> torch.Tensor:
    """The weight of a `base` as floating point numbers, by its library's own function."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    weight: Any = layer.weight
    if getattr(weight, "quant_state", None) is not None:
        return dequantize_4bit(weight.data, weight.quant_state)
    if getattr(weight, "SCB", None) is not None:
        return int8_vectorwise_dequant(weight.data, weight.SCB)
    if getattr(getattr(layer, "state", None), "SCB", None) is not None:
        return int8_vectorwise_dequant(weight.data, layer.state.SCB)
    if hasattr(weight, "__tensor_flatten__"):
        return weight.dequantize()
    return weight * 1
