"""What went wrong in the last run, for the browsers: what was lacking, and what was destroyed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from qmove_core import for_hosts

from .. import advice, browser, meter
from ..models import holders
from ..node_names import NodeName
from . import history

MOST_HOLDERS = 4  # of a device that was full

_numbers = itertools.count(1)
_failures: list[dict[str, Any]] = []


def of_last_run() -> list[dict[str, Any]]:
    """The failures of the run that runs now, or of the last one."""
    run = history.run_number()
    return [failure for failure in list(_failures) if failure["run"] == run]


def tell_shortage(
    node: NodeName | None, error: BaseException, full: Sequence[torch.device]
) -> None:
    """A node has run out of memory for good: what it lacked, and who holds the devices."""
    _tell(
        "shortage",
        node,
        reason=advice.for_people(error).splitlines()[0],
        devices=[
            {
                "name": str(device),
                "free": meter.free_bytes(device),
                "total": for_hosts.total_memory(device),
                "holders": [
                    {"name": holder.name, "nbytes": holder.nbytes, "kind": holder.kind}
                    for holder in _holders(device)[:MOST_HOLDERS]
                ],
            }
            for device in full
        ],
    )


def tell_lost(node: NodeName | None, lost: Iterable[tuple[str, Sequence[str]]]) -> None:
    """Somebody has emptied tensors of models that a node was given: (model, names of tensors)."""
    models = [{"name": model, "tensors": len(names)} for model, names in lost if names]
    if models:
        _tell("lost", node, reason="", models=models)


def _holders(device: torch.device) -> list[holders.Holder]:
    held = [*holders.models_on(device), *holders.others_on(device)]
    return sorted(held, key=lambda holder: -holder.nbytes)


def _tell(kind: str, node: NodeName | None, **parts: Any) -> None:
    run = history.run_number()
    failure: Mapping[str, Any] = {
        "id": next(_numbers),
        "run": run,
        "at": time.time(),
        "kind": kind,
        "stage": None if node is None else node.to_dict(),
        "devices": [],
        "models": [],
        **parts,
    }
    _failures[:] = [*(known for known in _failures if known["run"] == run), dict(failure)]
    browser.send(browser.FAILURE, dict(failure))
