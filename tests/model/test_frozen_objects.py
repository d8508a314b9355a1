"""`gc.freeze()` hides objects from the collector: what a look for holders must find all the same."""

from __future__ import annotations

import ast
import gc
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qmove_core as qmove
from qmove_core import collector
from qmove_core.model.heap import Heap
from qmove_core.model.places import places
from tests.builders.collector import everything_frozen
from tests.builders.device import GPU
from tests.builders.models import inputs, layers

ROOT = Path(__file__).parents[2]


class Keeper:
    """Something of the program's own that holds a tensor."""

    def __init__(self, tensor: object) -> None:
        self.kept = tensor


@pytest.fixture
def frozen() -> Iterator[None]:
    """Everything that the test makes can be frozen by it, and is set aside again after it."""
    with everything_frozen():
        yield


def test_an_alias_that_is_frozen_is_taken_along_and_comes_home(gpu: GPU, frozen: None) -> None:
    before = gpu.allocated()
    model = layers(1)
    alias = model[0].weight.data
    gc.freeze()

    parked = qmove.park(model)

    assert gpu.allocated() == before
    assert parked.stragglers == []
    assert alias.data_ptr() == model[0].weight.data_ptr()
    parked.restore()
    assert alias.device == gpu.device
    assert alias.data_ptr() == model[0].weight.data_ptr()


def test_a_storage_that_a_frozen_object_holds_is_reported_with_its_holder(
    gpu: GPU, frozen: None
) -> None:
    model = layers(1)
    keeper = Keeper(model[0].weight.untyped_storage())
    gc.freeze()

    (straggler,) = qmove.park(model).stragglers

    assert straggler.name == "0.weight"
    assert straggler.holders == ("the attribute 'kept' of a Keeper (as an UntypedStorage)",)
    del keeper


def test_a_frozen_graph_is_refused(gpu: GPU, frozen: None) -> None:
    model = layers(2).requires_grad_(True)
    loss = model(inputs()).sum()
    gc.freeze()

    with pytest.raises(qmove.LiveAutogradGraph, match="live autograd graph"):
        qmove.park(model)

    loss.backward()
    assert model[0].weight.grad is not None


def test_a_frozen_stranger_on_the_device_is_found_with_its_place(gpu: GPU, frozen: None) -> None:
    keeper = Keeper(torch.ones(64, device="cuda"))
    gc.freeze()

    heap = Heap(known=())

    assert heap.is_unclaimed(keeper.kept)
    (place,) = places(heap, [keeper.kept], lambda obj: "ours" if obj is keeper else None)
    assert str(place) == "ours, `self.kept`"


def test_a_park_that_looks_for_nobody_leaves_what_is_frozen(gpu: GPU, frozen: None) -> None:
    model = layers(2)
    gc.freeze()
    frozen_objects = gc.get_freeze_count()

    qmove.park(model)
    qmove.restore(model)

    assert gc.get_freeze_count() > frozen_objects // 2  # objects that die leave it


def test_it_is_said_once(frozen: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qmove")
    gc.freeze()

    keeper = Keeper(None)
    gc.freeze()
    assert any(obj is keeper for obj in collector.all_objects())
    collector.all_objects()

    (line,) = caplog.messages
    assert "gc.freeze()" in line


def test_nobody_asks_the_collector_past_what_is_frozen() -> None:
    """`gc.get_referrers` needs `all_objects` before it, in the same file."""
    askers: dict[str, set[str]] = {}
    for path in [*(ROOT / "qmove_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                name = node.func.attr
                if name in ("get_objects", "get_referrers"):
                    askers.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    assert askers == {
        "get_objects": {"qmove_core/collector.py"},
        # Both make their list of all objects first: holders in the same function, places a Heap.
        "get_referrers": {"qmove_core/model/holders.py", "qmove_core/model/places.py"},
    }
