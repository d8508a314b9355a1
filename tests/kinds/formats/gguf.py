"""GGUF blocks in three libraries' manner: diffusers, transformers, ComfyUI-GGUF."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind

INSIDE = 256  # a block of the K formats has 256 values


def blocks(quant_type: str) -> tuple[torch.Tensor, Any]:
    """A matrix of `WIDTH` x `INSIDE` random values in GGUF's own blocks, by the package gguf."""
    import gguf

    kind = gguf.GGMLQuantizationType[quant_type]
    values = numpy.random.default_rng(0).standard_normal((WIDTH, INSIDE)).astype(numpy.float32)
    try:
        return torch.from_numpy(gguf.quants.quantize(values, kind)), kind
    except NotImplementedError:  # gguf only reads the K formats: random bytes with sane scales
        _values, size = gguf.GGML_QUANT_SIZES[kind]
        raw = numpy.random.default_rng(0).integers(0, 127, (WIDTH, size), dtype=numpy.uint8)
        halves = raw.reshape(WIDTH, -1)
        scale = numpy.full((WIDTH, 1), 0.01, dtype=numpy.float16).view(numpy.uint8)
        if quant_type == "Q4_K":
            halves[:, 0:2], halves[:, 2:4] = scale, scale
        else:  # Q6_K ends with its scale
            halves[:, -2:] = scale
        return torch.from_numpy(raw), kind


def of_diffusers(quant_type: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        data, kind = blocks(quant_type)
        layer = GGUFLinear(INSIDE, WIDTH, bias=True, compute_dtype=torch.float32)
        layer.weight = GGUFParameter(data.cuda(), quant_type=kind)
        layer.bias = nn.Parameter(torch.randn(WIDTH).cuda(), requires_grad=False)
        return layer

    return build


def of_transformers(quant_type: str) -> Callable[[], nn.Module]:
    """transformers unpacks the blocks with a kernel from its hub, which is for CUDA and Metal."""

    def build() -> nn.Module:
        from transformers.integrations.gguf.utils import GgufLinear

        data, kind = blocks(quant_type)
        layer = GgufLinear(INSIDE, WIDTH, int(kind), bias=True)
        layer.weight.data = data
        layer.bias.data = torch.randn(WIDTH)
        layer.register_buffer("input_permutation", torch.arange(INSIDE), persistent=False)
        return layer.cuda()

    return build


class GGMLTensor(torch.Tensor):
    """As ComfyUI-GGUF's tensor behaves: `shape` is that of the values and not of the blocks,
    `clone` and `detach` give the tensor itself, and patches hang on it. Written anew from what its
    users see of it; the package itself is no distribution."""

    def __new__(cls, data: torch.Tensor, **_options: Any) -> Any:
        return torch.Tensor._make_subclass(cls, data, False)  # type: ignore[attr-defined]

    def __init__(self, data: torch.Tensor, *, tensor_type: Any, tensor_shape: Any) -> None:
        super().__init__()
        self.tensor_type, self.tensor_shape = tensor_type, tensor_shape
        self.patches: list[Any] = []

    def to(self, *args: Any, **kwargs: Any) -> Any:
        new = super().to(*args, **kwargs)
        new.tensor_type = self.tensor_type
        new.tensor_shape = self.tensor_shape
        new.patches = self.patches.copy()
        return new

    def clone(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def detach(self, *_args: Any, **_kwargs: Any) -> Any:
        return self

    def __deepcopy__(self, memo: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            raw = torch.Tensor.clone(self.as_subclass(torch.Tensor))
        new = GGMLTensor(raw, tensor_type=self.tensor_type, tensor_shape=self.tensor_shape)
        new.patches = copy.deepcopy(self.patches, memo)
        return new

    @property
    def shape(self) -> Any:
        return getattr(self, "tensor_shape", None) or self.size()


class GGMLLinear(nn.Module):
    """A layer in its manner: the weight is a parameter of that class, unpacked at each use; its
    `state_dict` has a tensor on the meta device in its place."""

    def __init__(self, quant_type: str) -> None:
        super().__init__()
        data, kind = blocks(quant_type)
        shape = torch.Size((WIDTH, INSIDE))
        tensor = GGMLTensor(data.cuda(), tensor_type=kind, tensor_shape=shape)
        tensor.patches = [(torch.randn(WIDTH, INSIDE).cuda(), "a patch")]
        self.weight = nn.Parameter(tensor, requires_grad=False)
        self.bias = nn.Parameter(torch.randn(WIDTH).cuda(), requires_grad=False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = torch.zeros(WIDTH, INSIDE, device="meta")
        destination[f"{prefix}bias"] = self.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from diffusers.quantizers.gguf.utils import dequantize_functions

        weight: Any = self.weight
        raw = weight.as_subclass(torch.Tensor).reshape(-1, weight.size(-1))
        import gguf

        values, size = gguf.GGML_QUANT_SIZES[weight.tensor_type]
        rows = raw.reshape(-1, size)
        unpack = dequantize_functions[weight.tensor_type]
        dense = unpack(rows, values, size, torch.float32).reshape(WIDTH, INSIDE)
        for patch, _name in weight.patches:
            dense = dense + patch
        return nn.functional.linear(x, dense.to(x.dtype), self.bias)


def kind(name: str, build: Callable[[], nn.Module], **options: Any) -> Kind:
    settings: dict[str, Any] = {"cpu": "close", "package": "gguf", **options}
    return Kind(f"GGUF {name}", build, inside=INSIDE, **settings)


META = "its state_dict has meta tensors, from which accelerate's map has no data"

KINDS = (
    kind("Q8_0 of diffusers", of_diffusers("Q8_0")),
    kind("Q4_0 of diffusers", of_diffusers("Q4_0")),
    kind("Q4_K of diffusers", of_diffusers("Q4_K")),
    kind("Q6_K of diffusers", of_diffusers("Q6_K")),
    kind(
        "Q8_0 of transformers",
        of_transformers("Q8_0"),
        kernels="transformers unpacks it with a kernel of its hub, for CUDA and Metal",
        cpu="bytes",
    ),
    *(
        kind(
            f"{quant_type} in ComfyUI-GGUF's manner",
            lambda quant_type=quant_type: GGMLLinear(quant_type),
            cannot={"materialized": META},
        )
        for quant_type in ("Q8_0", "Q4_K")
    ),
)
