"""Random histories of models that were loaded twice: each has the bytes that its twin has, which
lies on the host and was never moved; and in the end nothing is left."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qmove_core as qmove
from qmove_core.memory import shared
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.mirrors import held
from tests.builders.models import layers

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(not shared.is_possible(), reason="needs memfd, which Linux has"),
]

COUNT = 3  # models of the same weights


class Loads:
    """The same checkpoint loaded several times, and a twin of each."""

    def __init__(self) -> None:
        self.models = [layers(3) for _ in range(COUNT)]
        self.twins = [layers(3, device="cpu") for _ in range(COUNT)]

    def both(self, n: int) -> tuple[nn.Sequential, nn.Sequential]:
        return self.models[n], self.twins[n]

    def load_again(self, n: int) -> None:
        self.models[n], self.twins[n] = layers(3), layers(3, device="cpu")
        gc.collect()

    def write(self, n: int, change: Callable[[torch.Tensor], Any]) -> None:
        with torch.no_grad():
            for model in self.both(n):
                change(model[n].weight)

    def swap(self, n: int) -> None:
        one, other = self.models[n], self.models[(n + 1) % COUNT]
        qmove.restore(one)
        qmove.park(other)
        qmove.swap(one, other)

    def are_right(self) -> None:
        for model, twin in zip(self.models, self.twins, strict=True):
            here, there = model.state_dict(), twin.state_dict()
            assert all(torch.equal(here[name].cpu(), there[name]) for name in there)


STEPS: dict[str, Callable[[Loads, int], Any]] = {
    "park": lambda loads, n: qmove.park(loads.models[n]),
    "park all": lambda loads, n: [qmove.park(model) for model in loads.models],
    "restore": lambda loads, n: qmove.restore(loads.models[n]),
    "stream": lambda loads, n: qmove.restore(loads.models[n], stream=True),
    "use": lambda loads, n: loads.models[n](torch.ones(1, 64).to(loads.models[n][0].weight.device)),
    "swap": Loads.swap,
    "move": lambda loads, n: qmove.move(loads.models[n], "cpu"),
    "verify": lambda loads, n: qmove.configure(verify=n == 0),
    "mirrors": lambda loads, n: qmove.configure(keep_mirrors=n != 0),
    "trim": lambda loads, n: qmove.trim(),
    "load again": Loads.load_again,
    "double": lambda loads, n: loads.write(n, lambda weight: weight.mul_(2)),
    "through data": lambda loads, n: loads.write(n, lambda weight: weight.data[0].add_(1)),
    "as the others": lambda loads, n: loads.write(n, lambda weight: weight.data.fill_(3)),
    "other data": lambda loads, n: loads.write(
        n, lambda weight: setattr(weight, "data", weight.data * 0.5)
    ),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, COUNT - 1)), max_size=10))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_each_has_its_own_bytes_whatever_happened(gpu: GPU, steps: list[tuple[str, int]]) -> None:
    qmove.configure(share_from=1, verify=False, keep_mirrors=True)
    loads = Loads()
    for name, n in steps:
        STEPS[name](loads, n)
        stats = qmove.stats()
        assert min(stats.arena_bytes, stats.mirror_bytes, stats.spare_bytes) >= 0, (name, n)
    loads.are_right()
    for model in loads.models:
        qmove.restore(model)
    streaming.wait_for()
    loads.are_right()
    del loads, model
    gc.collect()
    qmove.trim()
    assert held() == 0
