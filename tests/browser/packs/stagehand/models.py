"""Models as people have them: quantized, with names that say what they do."""

from __future__ import annotations

import copy
import gc
from typing import Any

import torch
from aiohttp import web
from torch import nn

MIB = 1 << 20
KINDS = ("fp16", "int8", "nf4")
BYTES_PER_WEIGHT = {"fp16": 2.0, "int8": 1.0, "nf4": 0.5}
# fp16: so large that the core copies each layer by itself; the others: so small that quantizing one
# on a CPU takes no time.
MIB_OF_LAYER = {"fp16": 17, "int8": 4, "nf4": 2}


def build(name: str, kind: str, mib: int, device: str = "cuda:0") -> nn.Module:
    """A stack of equal linear layers, quantized by bitsandbytes; about `mib` MiB on the device."""
    width = int((MIB_OF_LAYER[kind] * MIB / BYTES_PER_WEIGHT[kind]) ** 0.5) // 64 * 64
    torch.manual_seed(mib)
    first = _layer(kind, width).to(device)
    layers = [first] + [copy.deepcopy(first) for _ in range(1, mib // MIB_OF_LAYER[kind])]
    cls = type(name, (nn.Sequential,), {})  # qmove calls a model by the name of its class
    return cls(*layers).requires_grad_(False)


def _layer(kind: str, width: int) -> nn.Module:
    import bitsandbytes

    if kind == "int8":
        layer: nn.Module = bitsandbytes.nn.Linear8bitLt(
            width, width, bias=False, has_fp16_weights=False
        )
    elif kind == "nf4":
        layer = bitsandbytes.nn.Linear4bit(
            width,
            width,
            bias=False,
            quant_type="nf4",
            compute_dtype=torch.float16,
            compress_statistics=True,
        )
    else:
        layer = nn.Linear(width, width, bias=False)
    return layer.half()


def add_routes(routes: Any) -> None:
    @routes.get("/stagehand/memory")
    async def memory(request: web.Request) -> web.Response:
        """Bytes of live tensors on each device, as the device itself counts them."""
        gc.collect()
        allocated = [
            torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count())
        ]
        return web.json_response({"allocated": allocated})
