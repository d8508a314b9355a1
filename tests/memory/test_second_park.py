"""The second park of unchanged weights copies 0 bytes, whatever the sizes of the storages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.digests import try_out_anew

pytestmark = pytest.mark.simulated

KIB, MIB = 1 << 10, 1 << 20

SIZES = [KIB, 100 * KIB, 512 * KIB + 4, MIB, 5 * MIB + 12, 8 * MIB - 4, 8 * MIB, 12 * MIB]
SIZES += [16 * MIB - 4, 16 * MIB, 17 * MIB, 23 * MIB + 20, 31 * MIB, 32 * MIB, 48 * MIB, 64 * MIB]
COUNTS = [1, 2, 3, 5]

TABLE = {
    f"{count} of {size}": [size] * count
    for size in SIZES
    for count in COUNTS
    if size * count <= 64 * MIB
}
TABLE |= {
    "300 of 1 KiB": [KIB] * 300,
    "40 of 1 MiB": [MIB] * 40,
    "one large, then small ones": [64 * MIB, *[KIB] * 20],
    "small ones, then one large": [*[KIB] * 20, 64 * MIB],
    "each once": SIZES[:-2],
    "each once, the largest first": SIZES[-3::-1],
    "a large one between two of 7 MiB": [7 * MIB, 20 * MIB, 7 * MIB],
}

RESTORES: dict[str, Callable[[nn.Module], object]] = {
    "restore": qmove.restore,
    "stream": lambda model: (qmove.restore(model, stream=True), streaming.wait_for()),
}


@pytest.fixture(autouse=True)
def first_model() -> Iterator[None]:
    """Each is the first model of a process: nothing was tried out before."""
    try_out_anew()
    yield
    qmove.trim()


@pytest.mark.parametrize("way", RESTORES.values(), ids=RESTORES.keys())
@pytest.mark.parametrize("sizes", TABLE.values(), ids=TABLE.keys())
def test_the_second_park_copies_nothing(
    gpu: GPU, sizes: list[int], way: Callable[[nn.Module], object]
) -> None:
    model = nn.ParameterList(
        [
            torch.full((nbytes // 4,), index + 0.5, device="cuda")
            for index, nbytes in enumerate(sizes)
        ]
    )
    ends = [(weight[0].item(), weight[-1].item()) for weight in model]

    assert qmove.park(model).copied_bytes == sum(sizes)
    gpu.reset_peak()
    way(model)
    peak = gpu.peak() - sum(sizes)
    again = qmove.park(model)
    qmove.restore(model)

    assert again.copied_bytes == 0
    assert peak <= 4 * MIB, "a little more than the model while digests are taken"
    assert [(weight[0].item(), weight[-1].item()) for weight in model] == ends
