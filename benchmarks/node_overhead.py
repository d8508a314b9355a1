"""What the pack costs each node where nothing lacks room: prompts on the tests' fake host with qmove
hooked in, and without.

`python benchmarks/node_overhead.py` in a checkout. It needs no ComfyUI. CPU time is counted, not wall
time: prompts of 60 nodes in a row, which give each other a number and take no VRAM. Counted is what
runs in qmove's own hooks: the difference of two whole prompts is mostly the host's own noise. Others
use the machine too, so the cheapest of all repetitions counts.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from tests.nodes.builders.fake_host import FakeHost

ROOT = Path(__file__).resolve().parent.parent
NODES, REPEATS = 60, 100
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Prints microseconds for each node."""
    import torch

    import simcuda

    with suppress(simcuda.SimulationError):  # a build of torch for a real GPU needs none
        simcuda.activate()
    from tests.nodes.builders.fake_host import FakeHost
    from tests.nodes.conftest import executor, hooks, settings

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda:0")  # a card in use has counters, which are read
    host = FakeHost(keeps_outputs=False)
    sys.modules.update(host.modules())

    class AddOne:
        FUNCTION = "run"

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, object]:
            return {"required": {"number": ("INT", {}), "seed": ("INT", {})}}

        def run(self, number: int, seed: int) -> tuple[int]:
            return (number + 1,)

    class FromAPack(AddOne):
        pass

    host.add(AddOne, pack="nodes")
    host.add(FromAPack)
    spent = _count_seconds(executor)
    executor.install()
    for name in ("AddOne", "FromAPack"):
        for switch in (False, True):
            settings.change({settings.AUTO_PARK: switch})
            extra = min(_seconds(host, name, spent) for _ in range(REPEATS)) / NODES * 1e6
            print(
                f"{name}, auto-parking {'on ' if switch else 'off'}: {extra:6.1f} us of CPU time a node"
            )
    hooks.unwrap_all()


def _count_seconds(executor: ModuleType) -> list[float]:
    """Lets the hooks before and after a node add the CPU seconds that they take to this list."""
    spent: list[float] = []

    def counting(hook: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(hook)
        def counted(*args: object) -> None:
            started = time.process_time()
            hook(*args)
            spent.append(time.process_time() - started)

        return counted

    for name in ("_stage", "_complete"):
        setattr(executor, name, counting(getattr(executor, name)))
    return spent


def _seconds(host: FakeHost, name: str, spent: list[float]) -> float:
    """CPU time in qmove's hooks in one prompt."""
    prompt = {
        str(index): {
            "class_type": name,
            "inputs": {"number": [str(index - 1), 0] if index else 0, "seed": index},
        }
        for index in range(NODES)
    }
    spent.clear()
    host.run(prompt)
    assert len(spent) == 2 * NODES
    return sum(spent)


if __name__ == "__main__":
    main()
