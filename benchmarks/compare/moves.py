"""qmove's single moves on one link, in a fresh process: first park, restore, second park, streaming
restore and a forward, a forward of a model that is larger than the VRAM it may take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from . import meter, workloads
from .kernels import virtual_kernels

SAMPLE = 256 << 20  # bytes copied and pinned to learn what the link and the host can do
COMPUTE = (
    0.5,
    1.0,
    2.0,
)  # the forward's time in the streaming measurement, as a share of the transfer's


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Readings by name, and `seconds_for`: what the bytes would take at the bare rates of link and
    pinning."""
    import qmove_core as qmove

    workload, folder = workloads.Workload(**request["workload"]), Path(request["folder"])
    torch.cuda.init()
    meter.use_link(request["link"])
    rates = _rates()
    model = workloads.load(workload, folder, 0, "cuda:0")
    x = workloads.inputs(workload, "cuda:0")
    result: dict[str, Any] = {}

    def measure(name: str, call: Any) -> Any:
        with meter.measured() as reading:
            value = call()
        result[name] = reading.as_dict() | {"copied_bytes": value.copied_bytes}
        return value

    with torch.no_grad():
        first = measure("first park", lambda: qmove.park(model))
        measure("restore", lambda: qmove.restore(model))
        measure("second park", lambda: qmove.park(model))
        measure("second restore", lambda: qmove.restore(model))
        result["seconds_for"] = {name: first.nbytes / rate for name, rate in rates.items()}
        if meter.SIMULATED:
            result["streaming"] = [_stream(qmove, model, x, share, result) for share in COMPUTE]
            result["rolling"] = [
                _roll(qmove, model, x, share, result, first.nbytes // 3) for share in COMPUTE
            ]
        result["wrong"] = workloads.differing(model, workload, folder, 0)
    result["nbytes"] = first.nbytes
    return result


def _stream(
    qmove: Any, model: Any, x: torch.Tensor, share: float, result: dict[str, Any]
) -> dict[str, float]:
    """A streaming restore and the first forward after it, whose kernels take `share` of the
    transfer's time together.

    "compute" is that forward on the resident model, launches included: it cannot be faster than
    that.
    """
    transfer = result["seconds_for"]["in"]
    with virtual_kernels(share * transfer / len(model.layers)):
        with meter.measured() as alone:
            model(x)
        qmove.park(model)
        with meter.measured() as both:
            qmove.restore(model, stream=True)
            model(x)
    compute = float(alone.link or 0.0)
    return {
        "share": share,
        "transfer": transfer,
        "compute": compute,
        "both": float(both.link or 0.0),
    }


def _roll(
    qmove: Any,
    model: Any,
    x: torch.Tensor,
    share: float,
    result: dict[str, Any],
    at_most: int,
) -> dict[str, float]:
    """A forward inside `resident(model, at_most=...)`, as `_stream` measures it; the first forward
    there, which learns the order of use, is apart.

    "transfer" is what the bytes that came in take at the bare rate.
    """
    transfer = result["seconds_for"]["in"]
    with virtual_kernels(share * transfer / len(model.layers)):
        with meter.measured() as alone:
            model(x)
        with qmove.resident(model, at_most=at_most):
            model(x)
            with meter.measured() as both:
                model(x)
    came = both.as_dict()["h2d_bytes"]
    return {
        "share": share,
        "at_most": at_most,
        "h2d_bytes": came,
        "transfer": transfer * came / result["first park"]["copied_bytes"],
        "compute": float(alone.link or 0.0),
        "both": float(both.link or 0.0),
    }


def _rates() -> dict[str, float]:
    """Bytes a second of one large pinned copy each way, and of locking memory that was touched
    before."""
    on_device = torch.empty(SAMPLE, dtype=torch.uint8, device="cuda:0")
    host = torch.zeros(SAMPLE, dtype=torch.uint8)
    cudart = torch.cuda.cudart()

    def rate(call: Any) -> float:
        torch.cuda.synchronize()
        before = _now()
        call()
        torch.cuda.synchronize()
        return SAMPLE / (_now() - before)

    found = {"pinning": rate(lambda: cudart.cudaHostRegister(host.data_ptr(), SAMPLE, 0))}
    found["out"] = rate(lambda: host.copy_(on_device, non_blocking=True))
    found["in"] = rate(lambda: on_device.copy_(host, non_blocking=True))
    cudart.cudaHostUnregister(host.data_ptr())
    return found


def _now() -> float:
    if not meter.SIMULATED:
        return time.perf_counter()
    from simcuda import clock

    return clock.now()
