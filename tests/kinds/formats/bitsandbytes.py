"""bitsandbytes: linear layers and embeddings with 8 and 4 bits, flat and double-quantized."""

from __future__ import annotations

from collections.abc import Callable

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


def int8_by_bytes(after_a_forward: bool) -> Callable[[], nn.Module]:
    """Codes and scales where a release without kernels for this machine would have put them."""

    def build() -> nn.Module:
        layer = bnb.nn.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False).half()
        layer.bias.data = layer.bias.data.cuda()
        codes = torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8).cuda()
        weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        scales = torch.rand(WIDTH).cuda()
        layer._parameters["weight"] = weight
        if after_a_forward:
            weight.CB = weight.SCB = None
            layer.state.CB, layer.state.SCB = weight.data, scales
        else:
            weight.CB, weight.SCB = weight.data, scales
        return layer.eval()

    return build


def nf4_by_bytes(nested: bool) -> Callable[[], nn.Module]:
    """The same with 4 bits; the scales of a nested one are codes with scales of their own."""

    def build() -> nn.Module:
        from bitsandbytes.functional import QuantState

        layer = bnb.nn.Linear4bit(
            WIDTH, WIDTH, compute_dtype=torch.float16, quant_type="nf4"
        ).half()
        layer.bias.data = layer.bias.data.cuda()
        blocks = WIDTH * WIDTH // 64
        inner = QuantState(
            absmax=torch.rand(1).cuda(),
            code=torch.rand(256).cuda(),
            blocksize=256,
            dtype=torch.float32,
        )
        state = QuantState(
            absmax=(
                torch.randint(0, 255, (blocks,), dtype=torch.uint8)
                if nested
                else torch.rand(blocks)
            ).cuda(),
            shape=torch.Size((WIDTH, WIDTH)),
            code=torch.rand(16).cuda(),
            blocksize=64,
            quant_type="nf4",
            dtype=torch.float16,
            offset=torch.tensor(0.5).cuda() if nested else None,
            state2=inner if nested else None,
        )
        codes = torch.randint(0, 255, (WIDTH * WIDTH // 2, 1), dtype=torch.uint8).cuda()
        weight = bnb.nn.Params4bit(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=64,
            compress_statistics=nested,
            quant_type="nf4",
            bnb_quantized=True,
            module=layer,
        )
        layer._parameters["weight"] = weight
        layer.quant_state = state
        return layer.eval()

    return build


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
        in_sample=in_sample,
        **{"cpu": "close", **options},  # type: ignore[arg-type]
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
    *(
        kind(name, build, kernels="laid out by hand: its kernels are not asked", cpu="bytes")
        for name, build in (
            ("int8 laid out by hand", int8_by_bytes(False)),
            ("int8 laid out by hand, after a forward", int8_by_bytes(True)),
            ("nf4 laid out by hand", nf4_by_bytes(False)),
            ("nf4 double laid out by hand", nf4_by_bytes(True)),
        )
    ),
)
