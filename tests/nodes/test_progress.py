"""A long move shows on the node and in ComfyUI's bar, and an interrupt stops it with the model
whole."""

from __future__ import annotations

from typing import Any

import pytest
from qmove_pack.nodes import NODE_CLASS_MAPPINGS
from qmove_pack.nodes.host import progress
from qmove_pack.nodes.host.models import residency

import qmove_core as qmove
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.snapshots import snapshot
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.fake_host import FakeHost

node = careless_nodes.node


@pytest.fixture(autouse=True)
def _small_pieces(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "SMALL", 0)  # each storage is a copy of its own
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_UPDATES", 0.0)
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL, *NODE_CLASS_MAPPINGS.values())


def interrupt_after(host: FakeHost, updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user interrupts when the bar has moved so often."""
    add = host.bars.append

    class Bars(list):  # type: ignore[type-arg]
        def append(self, item: Any) -> None:
            add(item)
            if len(host_bars) == updates:
                host.management.interrupt_current_processing(True)

    host_bars = host.bars
    monkeypatch.setattr(host, "bars", Bars())


def test_a_park_and_a_restore_show_on_their_node(host: FakeHost) -> None:
    model = model_of(16)
    total = sum(parameter.nbytes for parameter in model.parameters())
    with host.node_runs("7"):
        NODE_CLASS_MAPPINGS["QMovePark"]().park(model)  # type: ignore[attr-defined]

    assert {node_id for node_id, _done, _total in host.bars} == {"7"}
    assert host.bars[-1] == ("7", total, total)
    assert len(host.bars) > 4
    assert host.server.texts[0][0] == "7"
    assert host.server.texts[0][1].startswith("Parking Sequential: ")


def test_what_is_brought_home_before_a_node_shows_on_that_node(host: FakeHost) -> None:
    prompt = {
        "load": node("Load", mib=16, shape="plain"),
        "use": node("Use", model=("load", 0), seed=1),
    }
    host.run(prompt)
    residency.park(residency.idle_models([]))
    host.bars.clear()

    prompt["use"]["inputs"]["seed"] = 2
    host.run(prompt)

    assert {node_id for node_id, _done, _total in host.bars} == {"use"}


def test_outside_of_a_prompt_a_leftover_interrupt_stops_nothing(host: FakeHost, gpu: GPU) -> None:
    residency.take_in([model := model_of(16)])
    host.management.interrupt_current_processing(True)

    host.management.unload_all_models()

    assert gpu.allocated() == 0
    assert qmove.is_parked(model)


def test_an_interrupt_in_a_park_leaves_the_model_where_it_was(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16)
    (adopted,) = residency.take_in([model])
    before = snapshot(model)
    interrupt_after(host, 3, monkeypatch)

    with host.node_runs("7"), pytest.raises(host.management.InterruptProcessingException):
        residency.park([adopted])

    assert snapshot(model) == before
    assert not qmove.is_parked(model)


def test_an_interrupt_in_a_restore_leaves_the_model_parked_and_it_comes_home_later(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(16)
    before = snapshot(model)
    adopted = residency.take_in([model])
    residency.park(adopted)
    interrupt_after(host, 3, monkeypatch)

    with host.node_runs("7"), pytest.raises(host.management.InterruptProcessingException):
        residency.bring_home(adopted)

    assert gpu.allocated() == 0
    assert host.management.current_loaded_models == []
    residency.bring_home(adopted)
    assert snapshot(model) == before


def test_an_interrupt_between_stages_ends_the_prompt_as_comfyui_does_it(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = {
        "load": node("Load", mib=16, shape="plain"),
        "use": node("Use", model=("load", 0), seed=1),
    }
    first = host.run(prompt)["use"]
    residency.park(residency.idle_models([]))
    host.bars.clear()
    interrupt_after(host, 3, monkeypatch)

    prompt["use"]["inputs"]["seed"] = 2
    host.run(prompt)

    assert [type(error) for error in host.errors] == [host.management.InterruptProcessingException]
    assert "use" not in host.ran[2:]
    assert gpu.allocated() == 0
    prompt["use"]["inputs"]["seed"] = 1
    assert host.run(prompt)["use"] == first


def test_nothing_is_written_on_a_node_of_another_pack(host: FakeHost, gpu: GPU) -> None:
    """Whatever moves for it: what it was given comes home, and what it wakes itself."""
    prompt = {
        "load": node("Load", mib=16, shape="plain"),
        "use": node("Use", model=("load", 0), seed=1),
    }
    host.run(prompt)
    residency.park(residency.idle_models([]))
    host.server.sent.clear()
    prompt["use"]["inputs"]["seed"] = 2
    host.run(prompt)
    with host.node_runs("use"):
        residency.park(residency.idle_models([]))

    moves = [data for event, data in host.server.sent if event == "qmove.move"]
    assert {(move["verb"], move["node"]) for move in moves} == {("restore", "use"), ("park", "use")}
    assert host.server.texts == []


def test_a_node_of_qmove_shows_its_moves(host: FakeHost) -> None:
    model = model_of(16)
    prompt = {"load": node("Give", model=model), "park": node("QMovePark", model=("load", 0))}

    class Give(careless_nodes._Node):
        def run(self, model: Any) -> tuple[Any]:
            return (model,)

    host.add(Give)
    host.run(prompt)

    assert {node_id for node_id, _text in host.server.texts} == {"park"}
    assert host.server.texts[0][1].startswith("Parking ")
    assert host.server.texts[-1][1].startswith("Parked ")
