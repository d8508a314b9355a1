"""What PyTorch itself makes of a model: compiled, scripted, traced, pruned, sparse, nested."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tests.kinds.kind import WIDTH, Kind


def layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return model.cuda().requires_grad_(False).eval()


def example() -> torch.Tensor:
    return torch.ones(2, WIDTH, device="cuda")


def scripted() -> nn.Module:
    return torch.jit.script(layers())


def traced() -> nn.Module:
    return torch.jit.trace(layers(), example())


def frozen() -> nn.Module:
    """Its weights are constants in the code."""
    return torch.jit.freeze(torch.jit.script(layers()))


def compiled() -> nn.Module:
    return torch.compile(layers(), backend="eager")


def compiled_in_place() -> nn.Module:
    model = layers()
    model.compile(backend="eager")
    return model


def symbolic() -> nn.Module:
    return torch.fx.symbolic_trace(layers())


def weight_normed() -> nn.Module:
    model = layers()
    for index in (0, 2):
        nn.utils.parametrizations.weight_norm(model[index])
    return model


class WithJagged(nn.Module):
    """Two plain layers, and beside them a table with rows of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = layers()
        parts = [torch.randn(2, WIDTH), torch.randn(3, WIDTH)]
        self.table = torch.nested.nested_tensor(parts, layout=torch.jagged).cuda()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return layers()


def kind(name: str, build: Callable[[], nn.Module], **options: object) -> Kind:
    settings: dict[str, object] = {"cpu": "close", "keeps_dtype": False, **options}
    return Kind(name, build, is_whole=True, **settings)  # type: ignore[arg-type]


KINDS = (
    kind("torch.compile", compiled, rolls=False, materializes=False, in_sample=True),
    kind("torch.compile in place", compiled_in_place, rolls=False),
    kind("TorchScript, scripted", scripted, rolls=False, materializes=False, in_sample=True),
    kind("TorchScript, traced", traced, rolls=False, materializes=False),
    kind(
        "TorchScript, frozen",
        frozen,
        rolls=False,
        cannot={"copied while parked": "its copies share its constants, which no .cuda() moves"},
    ),
    kind("torch.fx", symbolic),
    kind("weight_norm", weight_normed),
    kind("nested tensor, jagged", WithJagged, renewed=("_seqlen_tensor",)),
    kind("inference tensors", in_inference_mode),
)
