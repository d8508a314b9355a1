"""bitsandbytes: linear layers and embeddings with 8 and 4 bits, flat and double-quantized."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def quantized(layer: nn.Module) -> nn.Module:
    layer = layer.half().eval().requires_grad_(False)
    layer.weight.data.normal_(0, 0.02)
    return layer.cuda()


def linear_8bit(threshold: float) -> nn.Module:
    return quantized(bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False, threshold=threshold))


def linear_8bit_after_a_forward() -> nn.Module:
    """After its first forward the layer keeps codes and scales in its state, not on the weight."""
    layer = linear_8bit(0.0)
    layer(torch.ones(2, WIDTH, dtype=torch.float16, device="cuda"))
    return layer


def linear_4bit(quant_type: str, nested: bool, storage: torch.dtype = torch.uint8) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        WIDTH,
        WIDTH,
        compute_dtype=torch.float16,
        quant_type=quant_type,
        compress_statistics=nested,
        quant_storage=storage,
    )
    return quantized(layer)


class Table(nn.Module):
    """An embedding that looks a row up for each number of its input, and adds it."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = quantized(embedding)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.embedding(x.float().argmax(dim=-1))


def kind(name: str, build: object, in_sample: bool = False, **options: object) -> Kind:
    return Kind(
        f"bitsandbytes {name}",
        build,  # type: ignore[arg-type]
        dtype=torch.float16,
        package="bitsandbytes",
        cpu="close",
        in_sample=in_sample,
        **options,  # type: ignore[arg-type]
    )


KINDS = (
    kind("int8", lambda: linear_8bit(0.0), in_sample=True),
    kind("int8 with outliers", lambda: linear_8bit(6.0), renewed=(".state.idx", ".state.subB")),
    kind("int8 after a forward", linear_8bit_after_a_forward),
    kind("nf4", lambda: linear_4bit("nf4", nested=False)),
    kind("nf4 double", lambda: linear_4bit("nf4", nested=True), in_sample=True),
    kind("fp4", lambda: linear_4bit("fp4", nested=False)),
    kind("fp4 double", lambda: linear_4bit("fp4", nested=True)),
    kind("nf4 in bfloat16 storage", lambda: linear_4bit("nf4", True, torch.bfloat16)),
    kind("embedding int8", lambda: Table(bnb.nn.Embedding8bit(WIDTH, WIDTH))),
    kind("embedding nf4", lambda: Table(bnb.nn.EmbeddingNF4(WIDTH, WIDTH))),
    kind("embedding fp4", lambda: Table(bnb.nn.EmbeddingFP4(WIDTH, WIDTH))),
)
