"""What the pack costs each node while it has nothing to do: ComfyUI's staging with qmove hooked in,
and without.

`python benchmarks/node_overhead.py` in a checkout. It needs no ComfyUI: the hooks run on the tests'
fake host, whose own staging takes a few microseconds, so that the difference is qmove's.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
NODES, REPEATS = 2000, 7
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Prints microseconds for each node."""
    import simcuda

    with suppress(simcuda.SimulationError):  # a build of torch for a real GPU needs none
        simcuda.activate()
    from tests.nodes.builders.fake_host import FakeHost
    from tests.nodes.conftest import executor, hooks, settings

    host = FakeHost()
    sys.modules.update(host.modules())

    class EmptyImage:
        @classmethod
        def INPUT_TYPES(cls) -> dict[str, object]:
            return {"required": {"width": ("INT", {})}}

    class FromAPack(EmptyImage):
        pass

    host.add(EmptyImage, pack="nodes")
    host.add(FromAPack)
    for name in ("EmptyImage", "FromAPack"):
        without = _microseconds(host, name)
        executor.install()
        for switch in (False, True):
            settings.change({settings.AUTO_PARK: switch})
            extra = _microseconds(host, name) - without
            print(
                f"{name}, auto-parking {'on ' if switch else 'off'}: {extra:6.1f} us for each node"
            )
        hooks.unwrap_all()


def _microseconds(host: object, name: str) -> float:
    return statistics.median(_once(host, name) for _ in range(REPEATS)) / NODES * 1e6


def _once(host: object, name: str) -> float:
    list_class: Callable[..., object] = host.list_class  # type: ignore[attr-defined]
    node = {"class_type": name, "inputs": {"width": 8}}
    nodes = list_class(SimpleNamespace(get_node=lambda _id: node), host.cache, host.classes)  # type: ignore[attr-defined]
    return asyncio.run(_stage_all(nodes))


async def _stage_all(nodes: object) -> float:
    started = time.perf_counter()
    nodes.add_node("0")  # type: ignore[attr-defined]
    for index in range(NODES):
        nodes.add_node(str(index + 1))  # type: ignore[attr-defined]  # a prompt ends when no node waits
        await nodes.stage_node_execution()  # type: ignore[attr-defined]
        nodes.complete_node_execution()  # type: ignore[attr-defined]
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
