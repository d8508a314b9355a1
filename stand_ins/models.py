"""A model that takes a share of the VRAM and notices when its weights change."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

CATEGORY = "qmove/stand-ins"
WIDTH = 4096  # 32 MiB a layer, in half precision
SHARE: dict[str, Any] = {
    "default": 0.4,
    "min": 0.05,
    "max": 0.9,
    "step": 0.05,
    "tooltip": "How much of the GPU's VRAM the model takes. Nothing is downloaded.",
}


class StandIn(nn.Module):
    """Layers of one value each: what a forward gives says whether all are there.

    Args:
        layers: how many, of 32 MiB.
        device: where they are made.
    """

    kind = 0  # of 0 to 3: no two kinds have the same weights

    def __init__(self, layers: int, device: torch.device) -> None:
        super().__init__()
        self.layers = nn.ParameterList(
            torch.full((WIDTH, WIDTH), self._value(number), dtype=torch.float16, device=device)
            for number in range(layers)
        ).requires_grad_(False)

    def _value(self, number: int) -> float:
        return (1 + 500 * self.kind + number % 500) / 2048  # exact in half precision

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """`given`: half precision, shape (n, 4096), on the model's device. Each layer sees it."""
        return torch.stack([(given @ weight)[0, 0] for weight in self.layers])

    def check(self) -> None:
        """Runs it.

        Raises:
            RuntimeError: a weight is not what it was.
        """
        device = next(self.parameters()).device
        one = torch.zeros(1, WIDTH, dtype=torch.float16, device=device)
        one[0, 0] = 1
        seen = self(one).float().tolist()
        if seen != [self._value(number) for number in range(len(self.layers))]:
            raise RuntimeError("The stand-in's weights are not what they were.")


Model = TypeVar("Model", bound=StandIn)


class Captioner(StandIn):
    kind = 1


class Segmenter(StandIn):
    kind = 2


class SpeechModel(StandIn):
    kind = 3


def load(cls: type[Model], share: float) -> Model:
    """A model on ComfyUI's device that takes this share of its memory.

    Raises:
        torch.OutOfMemoryError: there is too little VRAM left.
    """
    from comfy import model_management  # type: ignore[import-not-found]

    device: torch.device = model_management.get_torch_device()
    if device.type == "cpu":
        raise RuntimeError("The stand-ins are for a GPU: ComfyUI runs on the CPU here.")
    total = torch.get_device_module(device).mem_get_info(device)[1]
    layers = int(share * total) // (2 * WIDTH * WIDTH)
    return cls(max(1, layers), device)
