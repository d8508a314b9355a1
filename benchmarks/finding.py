"""What a look for models that no wire carries costs, in processes with few and with many objects.

`python benchmarks/finding.py` in a checkout; it needs no ComfyUI. A look is made only where VRAM
has grown that nothing explains, and may take about 0.3 s: then it gives up, and what it has not
found by then stays where it is. CPU time is counted; of the repetitions the
cheapest and the dearest are printed.
"""

from __future__ import annotations

import gc
import importlib
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REPEATS = 5
OBJECTS = (0, 1_000_000, 3_000_000)  # beyond those of PyTorch itself
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Prints milliseconds of a look, by objects in the process and by what there is to find."""
    import simcuda

    with suppress(simcuda.SimulationError):  # a build of torch for a real GPU needs none
        simcuda.activate()
    import torch
    from torch import nn

    from tests.nodes import conftest  # imports the pack as ComfyUI does
    from tests.nodes.builders.fake_host import FakeHost

    pack_name = conftest.settings.__name__.rpartition(".")[0]
    finding = importlib.import_module(f"{pack_name}.models.finding")
    adopted_models = importlib.import_module(f"{pack_name}.models.adopted").adopted_models

    host = FakeHost()
    sys.modules.update(host.modules())
    pack = ModuleType("pack")  # what a pack keeps lies in its globals
    exec("", vars(pack))
    sys.modules["pack"] = pack

    def a_module() -> Any:
        return nn.Sequential(*[nn.Linear(512, 512, device="cuda:0") for _ in range(200)])

    def eight_tensors() -> Any:
        return {"frames": [torch.ones(1 << 18, device="cuda:0") for _ in range(8)]}

    def eight_places() -> Any:
        return [Session(torch.ones(1 << 18, device="cuda:0")) for _ in range(8)]

    things: dict[str, Callable[[], Any]] = {
        "a module of 400 tensors": a_module,
        "8 tensors in a dict": eight_tensors,
        "8 sessions with a tensor each": eight_places,
    }
    others: list[object] = []
    for count in OBJECTS:
        while len(others) < count:
            others.append([None])
        alive = len(gc.get_objects())
        for name, make in things.items():
            seconds, found = [], 0
            for _ in range(REPEATS):
                vars(pack)["kept"] = make()
                finding.forget_all()
                seconds.append(_cpu_time(finding.look))
                found = len(adopted_models())
                del vars(pack)["kept"]
                gc.collect()
            quickest, slowest = min(seconds) * 1e3, max(seconds) * 1e3
            print(
                f"{alive:>10,} objects, {name}: {quickest:5.0f} to {slowest:.0f} ms, {found} found"
            )


class Session:
    """An object of a pack's own."""

    def __init__(self, state: object) -> None:
        self.state = state


def _cpu_time(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


if __name__ == "__main__":
    main()
