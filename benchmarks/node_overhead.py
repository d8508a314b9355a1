"""What the pack costs each node where nothing lacks room: prompts on the tests' fake host with qmove
hooked in, and without.

`python benchmarks/node_overhead.py` in a checkout. It needs no ComfyUI. CPU time is counted, not wall
time: prompts of 60 nodes in a row, which give each other a number and take no VRAM; the cheapest of
all repetitions counts, as others use the machine too.
"""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.nodes.builders.fake_host import FakeHost

ROOT = Path(__file__).resolve().parent.parent
NODES, REPEATS = 60, 60
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
    for name in ("AddOne", "FromAPack"):
        without = _microseconds(host, name)
        executor.install()
        for switch in (False, True):
            settings.change({settings.AUTO_PARK: switch})
            extra = _microseconds(host, name) - without
            print(
                f"{name}, auto-parking {'on ' if switch else 'off'}: {extra:6.1f} us of CPU time a node"
            )
        hooks.unwrap_all()


def _microseconds(host: FakeHost, name: str) -> float:
    """CPU time of a prompt, for each of its nodes."""
    prompt = {
        str(index): {
            "class_type": name,
            "inputs": {"number": [str(index - 1), 0] if index else 0, "seed": index},
        }
        for index in range(NODES)
    }
    return min(_seconds(host, prompt) for _ in range(REPEATS)) / NODES * 1e6


def _seconds(host: FakeHost, prompt: dict[str, object]) -> float:
    started = time.process_time()
    host.run(prompt)
    return time.process_time() - started


if __name__ == "__main__":
    main()
