"""optimum-quanto: integer and fp8 weights, and the layouts it packs for CUDA kernels."""

from __future__ import annotations

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def quantized(qtype: str) -> nn.Module:
    from optimum import quanto

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    quanto.quantize(model, weights=getattr(quanto, qtype))
    quanto.freeze(model)
    return model.cuda()


def kind(qtype: str, in_sample: bool = False) -> Kind:
    return Kind(
        f"optimum-quanto {qtype}",
        lambda: quantized(qtype),
        package="optimum-quanto",
        cpu="close",
        in_sample=in_sample,
    )


def marlin_int4() -> nn.Module:
    """A layer whose weight has the bytes of quanto's Marlin layout; its kernel is CUDA's alone."""
    from optimum.quanto.tensor.weights.marlin.int4.packed import MarlinInt4PackedTensor

    layer = nn.Linear(WIDTH, WIDTH, device="cuda")
    packed = torch.randint(0, 2**31 - 1, (WIDTH // 16, WIDTH * 2), dtype=torch.int32).cuda()
    weight = MarlinInt4PackedTensor(packed, torch.Size((WIDTH, WIDTH)), (WIDTH, 1))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def marlin_fp8() -> nn.Module:
    """The same for fp8."""
    from optimum.quanto.tensor.weights.marlin.fp8.packed import MarlinF8PackedTensor

    layer = nn.Linear(WIDTH, WIDTH, device="cuda")
    packed = torch.randint(0, 2**31 - 1, (WIDTH // 16, WIDTH * 4), dtype=torch.int32).cuda()
    weight = MarlinF8PackedTensor(packed, torch.Size((WIDTH, WIDTH)), (WIDTH, 1))
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


NO_KERNEL = "Marlin's kernels are CUDA's alone"

KINDS = (
    kind("qint8", in_sample=True),
    kind("qint4"),
    kind("qint2"),
    kind("qfloat8"),
    *(
        Kind(
            f"optimum-quanto Marlin {name}",
            build,
            package="optimum-quanto",
            kernels=NO_KERNEL,
            cpu="refused",
        )
        for name, build in (("int4", marlin_int4), ("fp8", marlin_fp8))
    ),
)
