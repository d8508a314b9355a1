"""The models that faults are tried on, each with what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.builders import quantized_layers
from tests.builders.dispatched_models import IN_RAM, ON_DISK, dispatched, tokens
from tests.builders.models import inputs, layers, torchao_layers


@dataclass
class Subject:
    """A model on its way through an operation.

    Attributes:
        model: what the operation is given.
        forward: computes with it; gives a tensor on its home.
        beside: what lives with it and must stay as it is: a model that shares its storages.
        folder: for files.
    """

    model: Any
    forward: Callable[[], torch.Tensor]
    folder: Path
    beside: list[Any] = field(default_factory=list)

    def parts(self) -> dict[str, Any]:
        """Everything that is compared, by name."""
        return {"model": self.model, **{f"beside {i}": m for i, m in enumerate(self.beside)}}


@dataclass(frozen=True)
class SubjectKind:
    """One kind of model.

    Attributes:
        tags: what it can do; see `operations.py`.
        singly: each storage is a copy of its own, as in a big model; else small ones go together.
    """

    build: Callable[[Path], Subject]
    tags: frozenset[str]
    singly: bool = True


class Views(nn.Module):
    """Three weights that are parts of one storage, one of them transposed, and a view as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        whole = torch.randn(3 * 64 * 64, device="cuda")
        self.first = nn.Parameter(whole[:4096].view(64, 64), requires_grad=False)
        self.second = nn.Parameter(whole[4096:8192].view(64, 64).t(), requires_grad=False)
        self.register_buffer("overlap", whole[2048:6144].view(64, 64))
        self.last = nn.Linear(64, 64, device="cuda").requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x @ self.first @ self.second + (x @ self.overlap))


def _plain(folder: Path) -> Subject:
    model = layers(3)
    return Subject(model, lambda: model(inputs()), folder)


def _tied(folder: Path) -> Subject:
    """One Parameter in two layers, and another Parameter over the same storage."""
    model = layers(3)
    model[2].weight = model[0].weight
    model[1].weight.data = model[0].weight.data
    return Subject(model, lambda: model(inputs()), folder)


def _views(folder: Path) -> Subject:
    model = Views()
    return Subject(model, lambda: model(inputs()), folder)


def _quantized(name: str) -> Callable[[Path], Subject]:
    def build(folder: Path) -> Subject:
        width = quantized_layers.WIDTH
        torch.manual_seed(0)
        plain = nn.Linear(64, width).half().cuda().requires_grad_(False)
        model = nn.Sequential(
            *quantized_layers.quantized(name), plain, *quantized_layers.quantized(name)
        ).eval()
        x = torch.linspace(-1, 1, 3 * width, device="cuda").half().reshape(3, width)
        model(x)  # bitsandbytes puts the scales of int8 elsewhere at the first forward
        return Subject(model, lambda: model(x), folder)

    return build


def _torchao(folder: Path) -> Subject:
    model = torchao_layers("int8")
    x = inputs(128).bfloat16()
    return Subject(model, lambda: model(x), folder)


def _dispatched(device_map: dict[str, Any], source: str) -> Callable[[Path], Subject]:
    def build(folder: Path) -> Subject:
        model = dispatched(folder, device_map, source)
        return Subject(model, lambda: model(tokens()), folder)

    return build


def _sharing(folder: Path) -> Subject:
    """Two models with one Parameter in both, and another pair of Parameters over one storage."""
    model, other = layers(3), layers(3)
    other[0].weight = model[0].weight
    other[1].weight = nn.Parameter(model[1].weight.data, requires_grad=False)
    return Subject(model, lambda: model(inputs()) + other(inputs()), folder, beside=[other])


def _kind(build: Callable[[Path], Subject], tags: str, singly: bool = True) -> SubjectKind:
    return SubjectKind(build, frozenset(tags.split()), singly)


SUBJECTS: dict[str, SubjectKind] = {
    "plain": _kind(_plain, "sequence file"),
    "plain in batches": _kind(_plain, "sequence file", singly=False),
    "tied": _kind(_tied, "sequence"),
    "views": _kind(_views, "plain"),
    "int8": _kind(_quantized("int8"), "sequence quantized"),
    "nf4": _kind(_quantized("nf4 double"), "sequence quantized"),
    "torchao": _kind(_torchao, "sequence", singly=False),
    "dispatched to RAM": _kind(_dispatched(IN_RAM, "dat"), "dispatched", singly=False),
    "dispatched to safetensors": _kind(
        _dispatched(ON_DISK, "safetensors"), "dispatched", singly=False
    ),
    "dispatched to .dat": _kind(_dispatched(ON_DISK, "dat"), "dispatched", singly=False),
    "two that share": _kind(_sharing, "sequence shares"),
}
