"""One measurement in a process of its own: `python [-m simcuda] -m benchmarks.compare.child TASK
JSON` prints a line of JSON."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from . import forwards, growth, little_room, moves, swaps, workloads


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """Writes the two models of a workload and what the first one answers."""
    workload, folder = workloads.Workload(**request["workload"]), Path(request["folder"])
    workloads.save(workload, folder)
    swaps.save_expected(workload, folder)
    return {"nbytes": workloads.nbytes(workload, folder)}


TASKS = {
    "prepare": prepare,
    "swaps": swaps.main,
    "moves": moves.main,
    "little room": little_room.main,
    "forward": forwards.main,
    "one size": growth.one_size,
    "beside a copy": growth.beside_a_copy,
}

if __name__ == "__main__":
    try:
        answer = TASKS[sys.argv[1]](json.loads(sys.argv[2]))
    except Exception as error:  # reported to the parent, which shows it
        answer = {"error": swaps.reason(error), "traceback": traceback.format_exc()}
    print("\n" + json.dumps(answer))
