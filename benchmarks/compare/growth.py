"""What qmove costs as a model grows, in tensors or in bytes; and beside a plain copy of the same
bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import meter

STEPS = ("inventory", "first park", "second park", "restore")


def one_size(request: dict[str, Any]) -> dict[str, Any]:
    """Readings of each step for a model of `tensors` tensors and about `nbytes` bytes, of `rounds`
    the one with the least wall.

    The first park happens once.
    """
    import qmove_core as qmove
    from qmove_core.digests.digest import digest_storages

    torch.cuda.init()
    meter.use_link(meter.LINKS[0])
    model = model_of(request["tensors"], request["nbytes"])
    held = qmove.inventory(model)
    steps: dict[str, Callable[[], object]] = {
        "inventory": lambda: qmove.inventory(model),
        "park": lambda: qmove.park(model),
        "restore": lambda: qmove.restore(model),
    }
    rounds = [_readings(steps) for _ in range(request["rounds"] + 1)]
    result: dict[str, Any] = {
        "tensors": request["tensors"],
        "nbytes": held.nbytes,
        "first park": rounds[0]["park"],
    }
    for step in steps:
        result[step if step != "park" else "second park"] = min(
            (r[step] for r in rounds[1:]), key=lambda r: r["wall"]
        )
    storages = [holding.storage for holding in qmove.inventory(model).holdings]
    digests = [_readings({"digest": lambda: digest_storages(storages)})["digest"] for _ in rounds]
    return result | {"digest": min(digests, key=lambda reading: reading["wall"])}


def _readings(steps: dict[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    readings = {}
    for name, call in steps.items():
        with meter.measured() as reading:
            call()
        readings[name] = reading.as_dict()
    return readings


def beside_a_copy(request: dict[str, Any]) -> dict[str, Any]:
    """Wall seconds of park and restore, and of a plain copy of the same storages to the host and
    back.

    "fresh": into memory that nobody used before. "again": the least of several rounds, with memory
    that is used again, and no mirrors, so that every byte is copied.
    """
    import qmove_core as qmove

    torch.cuda.init()
    model = model_of(request["tensors"], request["nbytes"])
    sources = [tensor.detach() for tensor in model.parameters()]
    targets: list[torch.Tensor] = []

    def out() -> None:
        targets.extend(torch.empty_like(source, device="cpu").copy_(source) for source in sources)

    def out_again() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def back() -> None:
        copies = [torch.empty_like(target, device="cuda:0").copy_(target) for target in targets]
        del copies

    result: dict[str, Any] = {"nbytes": sum(source.nbytes for source in sources)}
    result["copy fresh"] = {"out": _wall(out), "back": _wall(back)}
    result["copy again"] = {
        "out": min(_wall(out_again) for _ in range(request["rounds"])),
        "back": min(_wall(back) for _ in range(request["rounds"])),
    }
    targets.clear()
    sources.clear()
    qmove.configure(keep_mirrors=False)
    rounds = [
        (_wall(lambda: qmove.park(model)), _wall(lambda: qmove.restore(model)))
        for _ in range(request["rounds"] + 1)
    ]
    result["qmove fresh"] = {"out": rounds[0][0], "back": rounds[0][1]}
    result["qmove again"] = {
        "out": min(out for out, _ in rounds[1:]),
        "back": min(back for _, back in rounds[1:]),
    }
    return result


def model_of(tensors: int, nbytes: int) -> nn.Module:
    """Linear layers on the device, two tensors each, fp16; `nbytes` in all, as near as square
    layers come."""
    width = max(4, round((nbytes / tensors) ** 0.5))
    with torch.device("cuda:0"):
        layers = [nn.Linear(width, width, dtype=torch.float16) for _ in range(tensors // 2)]
    return nn.Sequential(*layers).requires_grad_(False)


def _wall(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started
