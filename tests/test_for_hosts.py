"""The door for hosts: its names, and that the ComfyUI pack uses nothing else of the core."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

import qmove_core as qmove
from qmove_core import for_hosts
from tests.builders.device import GPU
from tests.builders.models import layers

NODES = Path(__file__).resolve().parents[1] / "nodes"


def test_the_pack_uses_only_public_names_of_the_core_and_those_of_the_door() -> None:
    used = set()
    for file in NODES.rglob("*.py"):
        for item in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("qmove_core"):
                used |= {(item.module, alias.name) for alias in item.names}
            elif isinstance(item, ast.Import):
                used |= {(alias.name, "") for alias in item.names if "qmove_core" in alias.name}

    allowed = {("qmove_core", name) for name in ("", "for_hosts", *qmove.__all__)}
    allowed |= {("qmove_core.for_hosts", name) for name in for_hosts.__all__}
    assert len(used) > 3
    assert used <= allowed


def test_a_host_sees_where_a_parked_tensor_belongs_and_hears_of_each_move(gpu: GPU) -> None:
    model, moves = layers(2, width=64), []
    for_hosts.on_move(lambda: moves.append(for_hosts.parked_bytes().get("cuda:0", 0)))
    nbytes = qmove.inventory(model).nbytes

    qmove.park(model)

    with for_hosts.lock:
        homes = {for_hosts.parked_home(parameter) for parameter in model.parameters()}
    assert homes == {torch.device("cuda:0")}
    assert moves[-1] >= nbytes
    qmove.restore(model)
    assert for_hosts.parked_home(model[0].weight) is None


def test_all_names_of_the_door_are_documented() -> None:
    for name in for_hosts.__all__:
        assert name == "lock" or getattr(for_hosts, name).__doc__
