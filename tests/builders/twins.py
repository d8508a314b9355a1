"""Models that are the same checkpoint, loaded more than once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import qmove_core as qmove
from tests.builders.models import layers
from tests.builders.quantized_layers import quantized

KINDS: dict[str, Callable[[], nn.Sequential]] = {
    "plain": lambda: layers(3, width=96),
    "int8": lambda: quantized("int8"),
    "nf4": lambda: quantized("nf4 double"),
}


def loaded(kind: str) -> nn.Sequential:
    """One more load of the checkpoint of this kind, on the device."""
    return KINDS[kind]()


def weights_of(model: object) -> dict[str, bytes]:
    """The bytes of every storage that the model alone has, by name, wherever they are; none of
    them is touched."""
    found = {}
    for holding in qmove.inventory(model).holdings:
        with torch._C.DisableTorchFunctionSubclass():
            flat = torch.empty(0, dtype=torch.uint8, device=holding.storage.device).set_(
                holding.storage, 0, (holding.nbytes,), (1,)
            )
            found[holding.name] = bytes(flat.cpu().numpy().tobytes())
    return found


def both_parked(kind: str = "plain") -> tuple[nn.Sequential, nn.Sequential, dict[str, bytes]]:
    """Two models that share host memory, and their bytes."""
    one, other = loaded(kind), loaded(kind)
    before = weights_of(one)
    assert weights_of(other) == before
    qmove.park(one)
    assert qmove.park(other).copied_bytes == 0
    return one, other, before
