"""What a model of many small tensors costs besides its bytes: `inventory`, `park` and `restore` of
100 to 10,000 tensors.

    python -m simcuda benchmarks/many_tensors.py        # or, with a GPU: python benchmarks/many_tensors.py

Wall seconds, the best of five. On the simulated GPU they are the CPU's, and copies are those within
host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qmove_core as qmove

COUNTS = (100, 1_000, 10_000)
REPEATS = 5


def model_of(tensors: int) -> nn.Module:
    """Linear layers of 8 x 8, two tensors each."""
    return (
        nn.Sequential(*[nn.Linear(8, 8) for _ in range(tensors // 2)]).cuda().requires_grad_(False)
    )


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def main() -> None:
    """Prints one row for each number of tensors."""
    table = Table(title=f"milliseconds on {torch.cuda.get_device_name()}")
    for heading in ("tensors", "inventory", "park", "restore"):
        table.add_column(heading, justify="right")
    for count in COUNTS:
        model = model_of(count)
        rounds = [
            (
                seconds(lambda model=model: qmove.inventory(model)),
                seconds(lambda model=model: qmove.park(model)),
                seconds(lambda model=model: qmove.restore(model)),
            )
            for _ in range(REPEATS)
        ]
        table.add_row(
            str(count), *(f"{min(column) * 1e3:.1f}" for column in zip(*rounds, strict=True))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
