"""What a kind of model says of itself to the suite."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn

WIDTH = 128


@dataclass(frozen=True)
class Kind:
    """One kind of model: how it is built, and what of the checks its library can do at all.

    Attributes:
        name: as in the table, with its library first: "torchao int8 weight-only".
        build: gives the layer that the kind is about, on `cuda:0`. It stands between two plain ones
            in `model()`, unless `is_whole`.
        inside, outside: numbers in a row that goes into the layer, and comes out.
        dtype: of what goes in.
        is_whole: `build` gives the whole model. It takes `inputs()` too.
        package: the distribution that it needs; the kind is skipped where that is not installed.
        refuses: what its library raises where it cannot build the kind on this machine. The kind is
            skipped then, with the library's own words.
        cannot: checks that make no sense for it, each with the reason that the table gives.
        kernels: why it computes on no CPU, and so not here; then its bytes are checked alone.
        cpu: how `move(model, "cpu")` ends: "exact", "close" (other kernels), "runs"
            (another algorithm there), "refused" (by qmove,
            with a reason), or "bytes": it moves, and its library has no kernels for the CPU.
        materializes: whether what accelerate offloads of it can be read back; if not, that is
            refused by name.
        rolls: whether it can run in less VRAM than it takes; if not, that is refused by name.
        renewed: how the names of tensors end that its library makes anew in each forward.
        keeps_dtype: whether a cast of the whole model is refused, as it is for quantized weights.
        stays: parts of the names of what cannot be parked rightly, and so stays where it is.
        in_sample: whether it is part of the sample that normal CI runs.
    """

    name: str
    build: Callable[[], nn.Module]
    inside: int = WIDTH
    outside: int = WIDTH
    dtype: torch.dtype = torch.float32
    is_whole: bool = False
    package: str = ""
    refuses: tuple[type[Exception], ...] = ()
    cannot: Mapping[str, str] = field(default_factory=dict)
    kernels: str = ""
    cpu: str = "exact"
    materializes: bool = True
    rolls: bool = True
    renewed: tuple[str, ...] = ()
    keeps_dtype: bool = True
    stays: tuple[str, ...] = ()
    in_sample: bool = False

    def model(self) -> Any:
        """The model, frozen, in eval mode and on `cuda:0`; the same values each time."""
        self.require_package()
        torch.manual_seed(0)
        try:
            base = self.build()
        except self.refuses as error:
            pytest.skip(f"{self.needs}: {type(error).__name__}: {first_line(error)}")
        if self.is_whole:
            return frozen(base)
        return Between(base, self.inside, self.outside, self.dtype).eval()

    def inputs(self, device: str = "cuda") -> torch.Tensor:
        """Three rows for `model()`, the same each time."""
        x = torch.linspace(-1, 1, 3 * self.inside).reshape(3, self.inside)
        return x.to(device, self.dtype)

    def outputs(self, model: Any, device: str = "cuda") -> torch.Tensor:
        """What the model computes, on the CPU."""
        if self.kernels:
            pytest.skip(self.kernels)
        with torch.no_grad():
            result = model(self.inputs(device))
        assert result.device.type == device
        return result.cpu()

    @property
    def needs(self) -> str:
        """The package with its version; "torch" for a kind that needs none."""
        if not self.package:
            return f"torch {torch.__version__}"
        return f"{self.package} {metadata.version(self.package)}"

    def require_package(self) -> None:
        """Skips the test where the package is missing."""
        try:
            metadata.version(self.package or "torch")
        except metadata.PackageNotFoundError:
            pytest.skip(f"{self.package} is not installed; `make test-kinds` does it")


class Between(nn.Module):
    """A layer of some kind between two plain ones, which give it work and use what it gives."""

    def __init__(self, base: nn.Module, inside: int, outside: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(inside, inside, dtype=dtype, device="cpu").cuda()
        self.base = base
        self.last = nn.Linear(outside, outside, dtype=dtype, device="cpu").cuda()
        self.first.requires_grad_(False)
        self.last.requires_grad_(False)
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.base(self.first(x)).to(x.dtype))


def frozen(model: nn.Module) -> nn.Module:
    """In eval mode and without gradients; TorchScript's modules know no `requires_grad_`."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def module_is_there(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]
