"""What cannot be parked rightly: it is named, stays or is said to be invisible, and the rest goes."""

from __future__ import annotations

import ctypes

import torch
from torch import nn

from tests.kinds.formats.wrappers import Scaled, codes, scale
from tests.kinds.kind import WIDTH, Kind


class Unwilling(Scaled):
    """A wrapper subclass that does not say what is inside it."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        raise NotImplementedError("not yet")


class With(nn.Module):
    """A plain layer with something odd beside it."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).cuda().requires_grad_(False)
        setattr(self, name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class KernelWithAddress(nn.Module):
    """A layer that gives a kernel in C the address of its weight, in a ctypes object."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(WIDTH, WIDTH).cuda(), requires_grad=False)
        self.plain = nn.Linear(WIDTH, WIDTH).cuda().requires_grad_(False)
        self.handle = ctypes.c_void_p(self.packed.data_ptr())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.handle.value == self.packed.data_ptr(), "the kernel would read other memory"
        return self.plain(x)


class NunchakuLike(nn.Module):
    """Weights in C++: as nunchaku's `QuantizedFluxModel` holds them, in memory that PyTorch has not
    allocated and that no Python object leads to. Here the host's heap stands for it."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = (ctypes.c_byte * 4096)()
        self.plain = nn.Linear(WIDTH, WIDTH).cuda().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.plain(x) + ctypes.sizeof(self._memory)


def sparse() -> nn.Module:
    return With("table", torch.eye(WIDTH).to_sparse().cuda())


KINDS = (
    Kind(
        "wrapper that hides its tensors",
        lambda: With("weight", Unwilling(codes(), scale())),
        cpu="refused",
        keeps_dtype=False,
        stays=("base.weight",),
    ),
    Kind(
        "address in ctypes",
        KernelWithAddress,
        cpu="refused",
        stays=("base.packed",),
        keeps_dtype=False,
    ),
    Kind("weights in C++ (nunchaku)", NunchakuLike, cpu="close", keeps_dtype=False),
)
