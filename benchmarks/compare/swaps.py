"""One contender with one workload: two first swaps, ten more, and what is left and equal after."""

from __future__ import annotations

import gc
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import contenders, meter, workloads
from .kernels import virtual_kernels

SWAPS = 10
SWAPS_ON_FURTHER_LINKS = 2  # there and back: only the simulated link's speed differs, and its clock repeats itself exactly


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The figures of one contender; under "error" why it could not go on, under "stage" how far it
    came."""
    workload = workloads.Workload(**request["workload"])
    folder, result = Path(request["folder"]), {"stage": "getting ready"}
    try:
        torch.cuda.init()
        with torch.no_grad():
            _run(contenders.by_name(request["contender"]), workload, folder, result)
        result["stage"] = "done"
    except Exception as error:  # whatever a contender raises is its result
        result["error"] = reason(error)
        result["traceback"] = traceback.format_exc()
    return result


def _run(
    kind: type[contenders.Contender],
    workload: workloads.Workload,
    folder: Path,
    result: dict[str, Any],
) -> None:
    x = workloads.inputs(workload, "cuda:0")
    before, ram = meter.vram(), meter.PeakRam()
    try:
        meter.use_link(meter.LINKS[0])
        contender = kind(contenders.loader(workload, folder))
        with _kernels():
            contender.use(0, x)
            result["stage"] = "first swaps"
            with meter.measured() as first:
                contender.use(1, x)
                contender.use(0, x)
            result["first"] = first.as_dict()
            result["stage"] = "swaps"
            torch.cuda.reset_peak_memory_stats()
            for link in meter.LINKS:
                meter.use_link(link)
                number = SWAPS if link == meter.LINKS[0] else SWAPS_ON_FURTHER_LINKS
                with meter.measured() as reading:
                    for swap in range(number):
                        contender.use((swap + 1) % 2, x)
                result[f"swaps {link}" if link else "swaps"] = reading.as_dict() | {
                    "number": number
                }
            result["peak_vram"] = torch.cuda.max_memory_allocated() - before
            with meter.measured() as again:
                contender.use(0, x)
            result["again"] = again.as_dict()
        contender.put_away()
        result["left"] = meter.vram() - before
    finally:
        result["peak_ram"] = ram.stop()
    result["stage"] = "comparing"
    _compare(contender, workload, folder, x, result)


def _compare(
    contender: contenders.Contender,
    workload: workloads.Workload,
    folder: Path,
    x: torch.Tensor,
    result: dict[str, Any],
) -> None:
    """Real forwards against that of a fresh model, then every byte against the files."""
    expected = torch.load(folder / "expected.pt")
    result["same_output"] = bool(torch.equal(contender.use(0, x).cpu(), expected))
    contender.put_away()
    gc.collect()
    wrong = [
        f"model {index}: {name}"
        for index in range(2)
        for name in workloads.differing(contender.model(index), workload, folder, index)
    ]
    result["wrong"] = wrong[:5]
    result["same_bytes"] = not wrong
    result["keeps_changes"] = _keeps_changes(contender, x)


def _keeps_changes(contender: contenders.Contender, x: torch.Tensor) -> bool:
    """Whether a weight that was changed in place, as merging a LoRA does, is still changed after
    two swaps."""
    with _kernels():
        contender.use(0, x)
        with torch.no_grad():
            changed = contender.model(0).layers[0].bias.data.add_(1).cpu().clone()
        contender.use(1, x)
        contender.use(0, x)
    return torch.equal(contender.model(0).layers[0].bias.data.cpu(), changed)


def reason(error: Exception) -> str:
    """The error's first line; the failing line of code for one without words."""
    text = str(error).strip().splitlines()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text[0] if text else frame.line}"


def save_expected(workload: workloads.Workload, folder: Path) -> None:
    """The output of model 0 as it comes from its file."""
    model = workloads.load(workload, folder, 0, "cuda:0")
    with torch.no_grad():
        output = model(workloads.inputs(workload, "cuda:0")).cpu()
    if not torch.isfinite(output).all():
        raise ValueError(f"the workload {workload.name} is none: its output is not finite")
    torch.save(output, folder / "expected.pt")


def _kernels() -> AbstractContextManager[None]:
    return virtual_kernels(0.0) if meter.SIMULATED else nullcontext()
