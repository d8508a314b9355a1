"""The steps, in the order they run in. Each module has a function `run(checks, sizes)`."""

from __future__ import annotations

import importlib
from typing import NamedTuple


class Step(NamedTuple):
    """One step.

    Attributes:
        name: as in the result.
        module: in this package.
        seconds: how long it may take.
        allocator: what PYTORCH_CUDA_ALLOC_CONF is set to; None leaves it alone.
        simulated: whether it says something on the simulated GPU too.
    """

    name: str
    module: str
    seconds: int
    allocator: str | None = None
    simulated: bool = True


STEPS = (
    Step("facts", "machine_facts", 30),
    Step("pins", "pins", 90),
    Step("refused pins", "refused_pins", 40),
    Step("link", "link", 60),
    Step("digests", "digests", 90),
    Step("matrix", "matrix", 180),
    Step("matrix, expandable", "matrix", 120, "expandable_segments:True", simulated=False),
    Step("matrix, cudaMallocAsync", "matrix", 120, "backend:cudaMallocAsync", simulated=False),
    Step("races", "races", 60),
    Step("tight", "tight", 60),
    Step("neighbours", "neighbours", 40),
    Step("odd", "odd", 60),
)


def run(step: Step, *arguments: object) -> None:
    """Runs a step in this process."""
    importlib.import_module(f"{__name__}.{step.module}").run(*arguments)
