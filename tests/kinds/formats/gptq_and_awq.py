"""GPTQ and AWQ: GPTQModel's torch kernels; ExLlama's and Marlin's, which keep raw addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def packed(bits: int = 4, group: int = 32) -> dict[str, torch.Tensor]:
    """The tensors of a GPTQ layer, with random codes, as in a checkpoint."""
    per_int = 32 // bits
    groups = WIDTH // group

    def codes(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31 - 1, (rows, columns), dtype=torch.int32)

    return {
        "qweight": codes(WIDTH // per_int, WIDTH),
        "qzeros": codes(groups, WIDTH // per_int),
        "scales": torch.rand(groups, WIDTH, dtype=torch.float16) * 0.01,
        "g_idx": torch.arange(WIDTH, dtype=torch.int32) // group,
    }


def gptqmodel_torch() -> nn.Module:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer = TorchLinear(
        bits=4,
        group_size=32,
        sym=True,
        desc_act=False,
        in_features=WIDTH,
        out_features=WIDTH,
        bias=False,
        register_buffers=True,
    )
    for name, value in packed().items():
        getattr(layer, name).data.copy_(value)
    layer.cuda()
    layer.post_init()
    return layer


class ExLlama(nn.Module):
    """As ExLlama's layer in AutoGPTQ keeps a weight: tensors, and an address that its kernel in C++
    reads them at. (Its own package needs CUDA's compiler.)"""

    def __init__(self) -> None:
        super().__init__()
        for name, value in packed().items():
            self.register_buffer(name, value.cuda())
        self.q4 = self.qweight.data_ptr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.q4 == self.qweight.data_ptr(), "the kernel would read other memory"
        return x + self.scales.float().mean()


class ExLlamaV2(nn.Module):
    """The second one: a handle, built from the addresses of all of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in packed().items():
            self.register_buffer(name, value.cuda())
        self.q_tensors = {name: getattr(self, name) for name in ("qweight", "qzeros", "scales")}
        self.q_handle = [tensor.data_ptr() for tensor in self.q_tensors.values()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        now = [tensor.data_ptr() for tensor in self.q_tensors.values()]
        assert self.q_handle == now, "the kernel would read other memory"
        return x + self.scales.float().mean()


class Marlin(nn.Module):
    """As Marlin's layers are: repacked codes and a workspace for locks, all plain tensors. Its
    kernel gets them as arguments at each call."""

    def __init__(self) -> None:
        super().__init__()
        parts = packed()
        self.qweight = nn.Parameter(parts["qweight"].cuda(), requires_grad=False)
        self.scales = nn.Parameter(parts["scales"].cuda(), requires_grad=False)
        self.g_idx = nn.Parameter(torch.empty(0, dtype=torch.int32).cuda(), requires_grad=False)
        self.workspace = torch.zeros(WIDTH // 64 * 16, dtype=torch.int32).cuda()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.workspace.device == self.qweight.device
        return x + self.scales.float().mean()


def kind(name: str, build: Callable[[], nn.Module], **options: Any) -> Kind:
    return Kind(name, build, cpu=options.pop("cpu", "close"), **options)


KINDS = (
    kind(
        "GPTQ, GPTQModel's torch kernel",
        gptqmodel_torch,
        package="gptqmodel",
        refuses=(ImportError,),
        dtype=torch.float16,
        renewed=("._zeros_cache", "._zeros_cache_state", "._g_idx_long_cache_state"),
    ),
    *(
        kind(
            f"GPTQ, {name}",
            build,
            stays=("base.qweight", "base.qzeros", "base.scales", "base.g_idx"),
            cpu="refused",
            cannot={"copied while parked": "a copy of it has the addresses of the original"},
        )
        for name, build in (("ExLlama's addresses", ExLlama), ("ExLlama v2's handle", ExLlamaV2))
    ),
    kind("GPTQ, Marlin's workspace", Marlin),
)
