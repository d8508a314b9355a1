"""A forward before a park and after a restore, beside a twin that never moved: nothing of qmove is
left on the model, and PyTorch takes its fast paths again."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import meter, workloads

PRECISIONS = ("fp16", "int8", "nf4")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The ratio of a forward after a restore to one before the park, in pairs with the twin's.

    Returns:
        "ratio": the median over the rounds; "low" and "high": what half of the rounds lie between;
        "forward": seconds of the twin's shortest; "operators": before and after.
    """
    import qmove_core as qmove

    layers = request["layers"]
    workload = workloads.Workload("forward", request["precision"], request["width"], layers)
    with tempfile.TemporaryDirectory(prefix="qmove-bench-") as name, torch.inference_mode():
        folder = Path(name)
        workloads.save(workload, folder)
        model, twin = (workloads.load(workload, folder, 0, "cuda:0") for _ in range(2))
        x = workloads.inputs(workload, "cuda:0")
        for each in (model, twin):
            for _ in range(3):
                each(x)
        ratios, operators = [], [_operators(model, x)]
        for _ in range(request["rounds"]):
            before = _beside(model, twin, x, request["pairs"])
            qmove.park(model)
            qmove.restore(model)
            ratios.append(_beside(model, twin, x, request["pairs"]) / before)
        operators.append(_operators(model, x))
        low, ratio, high = statistics.quantiles(ratios, n=4)
        seconds = min(_seconds(lambda: twin(x)) for _ in range(request["pairs"]))
    figures = {"ratio": ratio, "low": low, "high": high, "forward": seconds}
    return figures | {"operators": operators, "rounds": request["rounds"]}


def _beside(model: Any, twin: Any, x: torch.Tensor, pairs: int) -> float:
    """How many times as long as the twin's a forward of the model takes: the shortest of each, as
    whatever else runs on the machine only adds to it."""
    least = {id(model): float("inf"), id(twin): float("inf")}
    for number in range(pairs):
        for each in (model, twin) if number % 2 else (twin, model):
            least[id(each)] = min(least[id(each)], _seconds(lambda: each(x)))  # noqa: B023
    return least[id(model)] / least[id(twin)]


def _seconds(call: Callable[[], Any]) -> float:
    """CPU time of the thread where the GPU is simulated, whose kernels run in it; else wall time."""
    clock = time.thread_time if meter.SIMULATED else time.perf_counter
    torch.cuda.synchronize()
    before = clock()
    call()
    torch.cuda.synchronize()
    return clock() - before


def _operators(model: Any, x: torch.Tensor) -> int:
    """How many operators a forward runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, func: Any, _types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    with Counting() as counting:
        model(x)
    return counting.count
