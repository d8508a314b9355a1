"""The panel and the history make no context on a GPU that nobody uses: it would take its VRAM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from qmove_pack.nodes.host.panel import history, state

import simcuda
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def fresh(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    careless_nodes.forget_all()
    monkeypatch.setattr(history, "_last", None)
    host.add(*careless_nodes.ALL)
    simcuda.reset_contexts("300MiB")
    torch.zeros(1, device="cuda:0")  # as ComfyUI does at its start
    yield
    simcuda.reset_contexts()


def test_by_a_run(host: FakeHost) -> None:
    host.run(
        {
            "load": node("Load", mib=16, shape="plain"),
            "use": node("Use", model=("load", 0), seed=1),
        }
    )
    run = history.last_run()
    assert run is not None
    assert [name for name, points in run["used"].items() if any(points)] == ["cuda:0"]
    assert {len(points) for points in run["used"].values()} == {len(run["times"])}
    assert simcuda.contexts() == [0]


def test_by_an_open_panel(host: FakeHost) -> None:
    state.outline()
    first, other = state.snapshot()["devices"]
    assert first["free"] is not None
    assert (other["total"], other["free"]) == (simcuda.parse_size("4GiB"), None)
    assert simcuda.contexts() == [0]
