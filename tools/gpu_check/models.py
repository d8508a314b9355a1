"""The models that the steps move, made from random bytes: one for each kind that is installed."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable

import torch
from torch import nn

import qmove_core as qmove

WIDTH = 1024


def stack(nbytes: int, device: str = "cuda:0", dtype: torch.dtype = torch.float16) -> nn.Sequential:
    """Square linear layers without bias, of about `nbytes` in all."""
    size = WIDTH * WIDTH * torch.empty(0, dtype=dtype).element_size()
    layers = [
        nn.Linear(WIDTH, WIDTH, bias=False, device=device, dtype=dtype)
        for _ in range(max(2, nbytes // size))
    ]
    for layer in layers:
        nn.init.normal_(layer.weight, std=WIDTH**-0.5)
    return nn.Sequential(*layers).requires_grad_(False).eval()


def many(count: int, device: str = "cuda:0") -> nn.Module:
    """A model of `count` tensors of 50 kB."""
    model = nn.Module()
    for index in range(count):
        model.register_buffer(f"b{index}", torch.randn(12_500, device=device))
    return model


def _bitsandbytes(nbytes: int, precision: str) -> nn.Module:
    import bitsandbytes as bnb

    plain = stack(min(nbytes, 64 << 20), "cpu")
    for index, layer in enumerate(plain):
        quantized = (
            bnb.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
            if precision == "int8"
            else bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4")
        )
        quantized.load_state_dict(layer.state_dict())
        plain[index] = quantized
    return plain.to("cuda:0").requires_grad_(False).eval()


def _torchao(nbytes: int) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = stack(min(nbytes, 64 << 20), dtype=torch.bfloat16)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def _quanto(nbytes: int) -> nn.Module:
    import optimum.quanto

    model = stack(min(nbytes, 64 << 20))
    optimum.quanto.quantize(model, weights=optimum.quanto.qint4)
    optimum.quanto.freeze(model)
    return model.requires_grad_(False)


def kinds(nbytes: int, count: int) -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """By name: the package that the kind needs, and what makes a model of it."""
    return {
        "fp16": ("torch", lambda: stack(nbytes)),
        "int8": ("bitsandbytes", lambda: _bitsandbytes(nbytes, "int8")),
        "nf4": ("bitsandbytes", lambda: _bitsandbytes(nbytes, "nf4")),
        "torchao int8": ("torchao", lambda: _torchao(nbytes)),
        "quanto int4": ("optimum.quanto", lambda: _quanto(nbytes)),
        "many tensors": ("torch", lambda: many(count)),
    }


def is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of its parent
        return False


def hashes(model: object) -> list[str]:
    """SHA-256 of each storage, computed on the CPU without any code of qmove's copies."""
    found = []
    for holding in qmove.inventory(model).holdings:
        whole = torch.empty(0, dtype=torch.uint8, device=holding.device).set_(holding.storage)
        found.append(hashlib.sha256(whole.cpu().numpy().tobytes()).hexdigest())
    return found


def output(model: nn.Module) -> torch.Tensor | None:
    """What the model computes for fixed inputs, on the CPU; None for one that only holds tensors."""
    if not isinstance(model, nn.Sequential):
        return None
    dtype = torch.bfloat16 if next(model.parameters()).dtype == torch.bfloat16 else torch.float16
    inputs = torch.linspace(-1, 1, WIDTH, device="cuda:0").to(dtype).reshape(1, -1)
    with torch.no_grad():
        return model(inputs).cpu()
