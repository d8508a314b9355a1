"""Where nothing is parked and nothing lacks room, a node costs two readings of the allocator and waits
for no move (`benchmarks/node_overhead.py` measures what that takes)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import meter, settings

import qmove_core as qmove
from qmove_core import homes
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.threads import in_threads
from tests.nodes.builders.fake_host import FakeHost

NODES = 5


class AddOne:
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, object]:
        return {"required": {"number": ("INT", {})}}

    def run(self, number: int) -> tuple[int]:
        return (number + 1,)


def prompt(number: int = 0) -> dict[str, Any]:
    links: list[Any] = [number, *([str(index), 0] for index in range(NODES - 1))]
    return {
        str(index): {"class_type": "AddOne", "inputs": {"number": link}}
        for index, link in enumerate(links)
    }


@pytest.mark.parametrize(("switch", "expected"), [(True, 2), (False, 0)], ids=["on", "off"])
def test_the_allocator_is_read_twice_a_node(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch, switch: bool, expected: int
) -> None:
    torch.zeros(1, device=gpu.device)  # a card in use has counters
    host.add(AddOne)
    settings.change({settings.AUTO_PARK: switch})
    readings: list[meter.Stats] = []
    read = meter.all_stats
    monkeypatch.setattr(meter, "all_stats", lambda: readings.append(read()) or readings[-1])

    host.run(prompt())

    assert len(readings) == expected * NODES
    assert all(gpu.device in reading for reading in readings)


def test_nobody_asks_what_is_parked_where_nothing_is(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.add(AddOne)
    asked: list[str] = []
    monkeypatch.setattr(qmove, "parked_models", lambda: asked.append("asked") or [])

    host.run(prompt())
    assert asked == []

    model = layers(1)
    qmove.park(model)
    host.run(prompt(1))
    assert asked


def test_something_may_be_away_while_another_thread_moves(gpu: GPU) -> None:
    assert homes.nothing_away()
    with homes.lock:
        assert in_threads(homes.nothing_away, count=1) == [False]
    model = layers(1)
    qmove.park(model)
    assert not homes.nothing_away()
