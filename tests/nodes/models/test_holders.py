"""Who holds a device that is no model; what an out-of-memory says of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qmove_pack.nodes.host.models import finding, holders, residency
from qmove_pack.nodes.host.panel import state

from qmove_core import nvml
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_of, node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _nothing_known(host: FakeHost) -> None:
    careless_nodes.forget_all()
    finding.forget_all()
    host.add(*careless_nodes.ALL)


def test_what_nobody_explains_is_a_line_of_its_own(host: FakeHost, gpu: GPU) -> None:
    model = model_of(16)
    residency.take_in([model])
    hidden = torch.zeros(8 * MIB, dtype=torch.uint8, device=gpu.device)

    (own,) = holders.models_on(gpu.device)
    unknown = holders.others_on(gpu.device)[-1]

    assert (own.name, own.nbytes) == ("Sequential", sum(p.nbytes for p in model.parameters()))
    assert "not explained" in unknown.name
    assert unknown.nbytes >= hidden.nbytes
    (device,) = [d for d in state.snapshot()["devices"] if d["name"] == str(gpu.device)]
    free = device["total"] - own.nbytes - sum(other["nbytes"] for other in device["others"])
    assert free == device["free"]


def test_other_programs_are_named(
    host: FakeHost, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserved = torch.zeros(8 * MIB, dtype=torch.uint8, device=gpu.device)
    others = [nvml.Process(1, 6 * MIB), nvml.Process(2**22 + 1, None)]
    monkeypatch.setattr(nvml, "processes", lambda device: others)

    held = holders.others_on(gpu.device)

    assert held[0].nbytes == 6 * MIB
    assert "process 1" in held[0].name
    assert sum(holder.nbytes for holder in held) >= reserved.nbytes
    assert "end that program" in holders.table(gpu.device)[-1] + holders.table(gpu.device)[0]


def test_an_out_of_memory_names_the_holders(host: FakeHost, caplog: Any) -> None:
    import simcuda

    simcuda.set_memory(64 * MIB)

    class Greedy(careless_nodes.Use):
        """Uses the model, so that it cannot go, and more than is left."""

        def run(self, model: Any, seed: int = 0, after: Any = None) -> tuple[Any]:
            return (torch.zeros(40 * MIB, dtype=torch.uint8, device="cuda:0"),)

    host.add(Greedy)
    load = {"load": node("Load", mib=40, shape="plain")}
    host.run({**load, "greedy": node("Greedy", model=("load", 0), seed=1)})

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert "Who holds it now:" in caplog.text
    assert "Sequential. To free it: Park Model" in caplog.text
