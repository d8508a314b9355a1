"""A GPU whose memory is the machine's own RAM: parking gains nothing there."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.stages import auto_parking, requests

import qmove_core as qmove
import simcuda
from qmove_core.cli.doctor import examine
from qmove_core.devices import shares_memory_with_host
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_in, stages
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated


@pytest.fixture
def integrated(host: FakeHost) -> Iterator[None]:
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL)
    simcuda.set_memory(200 * MIB)
    simcuda.set_integrated(0)
    auto_parking.parks_on.cache_clear()
    yield
    simcuda.set_integrated(0, False)
    auto_parking.parks_on.cache_clear()


def test_nothing_is_parked_there_by_itself_and_that_is_said_once(
    host: FakeHost,
    integrated: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parked: list[object] = []
    monkeypatch.setattr(residency, "park", parked.extend)
    with caplog.at_level(logging.WARNING, "qmove"):
        host.run(stages(3, 76))  # three models of 76 MiB: with parking they would take turns
    assert parked == []  # where ComfyUI unloads everything after the error, that is its doing
    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert sum("shares its memory with the CPU" in r.getMessage() for r in caplog.records) == 1


def test_the_user_may_park_there_all_the_same(host: FakeHost, integrated: None) -> None:
    host.run(stages(1, 76))
    model = model_in(host, "load1")
    assert "Parked" in requests.park_value(model)
    assert qmove.is_parked(model)


def test_the_doctor_says_it(integrated: None) -> None:
    assert any("cuda:0 shares its memory" in finding for finding in examine().findings)
    assert not any("cuda:1 shares its memory" in finding for finding in examine().findings)
    assert shares_memory_with_host(torch.device("mps"))
