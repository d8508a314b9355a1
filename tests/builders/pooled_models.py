"""Models for a pool: small, each with weights of its own, with loaders that count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from qmove_core.pool import ModelPool

WIDTH = 256
SIZE = 2 * WIDTH * WIDTH * 4  # bytes of each model
DEVICE = torch.device("cuda:0")


class Loaders:
    """Attributes:
    loads: how often each model was loaded.
    fail: called in the middle of each load, with its name.
    """

    def __init__(self) -> None:
        self.loads: Counter[str] = Counter()
        self.fail: Callable[[str], None] = lambda name: None

    def __call__(self, name: str, device: str = "cuda:0") -> Callable[[], nn.Module]:
        def load() -> nn.Module:
            self.loads[name] += 1
            model = build(name).to(device)
            self.fail(name)
            return model

        return load


def build(name: str) -> nn.Sequential:
    """The model of that name, on the CPU."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)]
    for layer in layers:
        layer.weight = nn.Parameter(
            torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5, requires_grad=False
        )
    return nn.Sequential(*layers).eval()


def given(name: str) -> torch.Tensor:
    """What the model of that name gives for `inputs()` on the CPU, without a pool."""
    return build(name)(inputs("cpu"))


def inputs(device: str = "cuda:0") -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH).to(device)


def is_right(model: nn.Module, name: str) -> bool:
    """Whether a model computes what the one of that name computes, bit for bit in its weights."""
    weights = [parameter.detach().cpu() for parameter in model.parameters()]
    return all(torch.equal(a, b) for a, b in zip(weights, build(name).parameters(), strict=True))


def full_pool(
    loaders: Loaders, names: str, *, vram: float = 1, ram: float = 100, seconds: float = 1.0
) -> ModelPool:
    """A pool with a model of each letter, budgets counted in models."""
    pool = ModelPool(vram=int(vram * SIZE), ram=int(ram * SIZE), device=DEVICE)
    for name in names:
        pool.add(name, loaders(name), nbytes=SIZE, seconds=seconds)
    return pool
