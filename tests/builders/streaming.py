"""Models that arrive: a restore that has begun, and layers that compute for a given time."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.parking import streaming
from tests.builders.link import copies_queued


def is_arriving() -> bool:
    return bool(streaming._under_way)


def stream_in(model: object) -> qmove.Restored:
    """Begins a streaming restore of a parked model."""
    restored = qmove.restore(model, stream=True)
    assert is_arriving() and copies_queued() > 0, "it waited"
    return restored


class Timed(nn.Module):
    """A layer of 20 MiB that computes for a given time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.ones(20 << 20, dtype=torch.uint8, device="cuda"), requires_grad=False
        )
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        simcuda.clock.compute(self.seconds)
        return x + self.weight[-1]


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def saved(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
