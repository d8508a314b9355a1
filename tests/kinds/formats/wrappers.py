"""Wrapper subclasses of our own: one in another, several inner tensors, none that can be reached."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from tests.kinds.kind import WIDTH, Kind


class Scaled(torch.Tensor):
    """`codes * scale`, as one writes a quantized tensor by hand. `codes` may be one as well."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, codes.shape, strides=codes.stride(), dtype=scale.dtype, device=codes.device
        )

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: None, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"])

    def dequantize(self) -> torch.Tensor:
        codes = self.codes.dequantize() if isinstance(self.codes, Scaled) else self.codes
        return codes.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes.detach(), args[0].scale.detach())
        args, kwargs = tree_map_only(Scaled, Scaled.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)


class Opaque(Scaled):
    """Without `__tensor_flatten__`: nobody can ask it for its inner tensors."""

    __tensor_flatten__ = None  # type: ignore[assignment]


class Unwilling(Scaled):
    """Its `__tensor_flatten__` raises."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        raise NotImplementedError("not yet")


def codes() -> torch.Tensor:
    return torch.randint(-8, 8, (WIDTH, WIDTH), dtype=torch.int8).cuda()


def scale() -> torch.Tensor:
    return torch.rand(WIDTH, 1).cuda()


def layer(weight: torch.Tensor) -> nn.Module:
    result = nn.Linear(WIDTH, WIDTH, device="cuda")
    result.weight = nn.Parameter(weight, requires_grad=False)
    return result


KINDS = (
    Kind("wrapper of our own", lambda: layer(Scaled(codes(), scale())), cpu="close"),
    Kind(
        "wrapper in a wrapper",
        lambda: layer(Scaled(Scaled(codes(), scale()), scale())),
        cpu="close",
        in_sample=True,
    ),
)
