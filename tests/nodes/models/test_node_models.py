"""Which models a node's menu can park: those it gave, else those it took, as long as they live."""

from __future__ import annotations

import gc

import pytest
from qmove_pack.nodes.host import routes, settings
from qmove_pack.nodes.host.models import node_models
from qmove_pack.nodes.host.panel import state

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import node
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

PROMPT = {
    "load": node("Load", mib=16, shape="pipeline"),
    "use": node("Use", model=("load", 0), seed=1),
}


@pytest.fixture(autouse=True)
def _nodes(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    careless_nodes.forget_all()
    monkeypatch.setattr(node_models, "_by_node", {})
    host.add(*careless_nodes.ALL)


@pytest.mark.parametrize("auto_park", [True, False])
@pytest.mark.parametrize(("node_id", "class_name"), [("load", "Load"), ("use", "Use")])
def test_the_model_of_a_node_is_parked_and_restored_by_its_menu(
    host: FakeHost, gpu: GPU, auto_park: bool, node_id: str, class_name: str
) -> None:
    settings.change({settings.AUTO_PARK: auto_park})
    host.run(PROMPT)
    full = gpu.allocated()
    target = {"node": node_id, "class": class_name}
    assert node_id in state.snapshot()["nodes"]

    assert routes._run(routes.read_park(target))[0] == 200
    assert gpu.allocated() == 0
    assert routes._run(routes.read_restore(target))[0] == 200
    assert gpu.allocated() == full


def test_another_node_with_the_same_id_has_no_model(host: FakeHost) -> None:
    host.run(PROMPT)

    assert node_models.models_of("load", "Load")
    assert node_models.models_of("load", "Scratch") == []


def test_a_node_whose_models_are_gone_is_forgotten(host: FakeHost) -> None:
    host.run(PROMPT)
    host.cache.entries.clear()
    gc.collect()

    assert node_models.nodes_with_models() == []


def test_a_node_without_a_model_is_not_among_them(host: FakeHost) -> None:
    host.run({"scratch": node("Scratch", mib=1)})

    assert node_models.nodes_with_models() == []


def test_comfyuis_own_models_are_unloaded_and_loaded_by_comfyui(host: FakeHost, gpu: GPU) -> None:
    patcher = ModelPatcher(careless_nodes.model_of(16))

    class Checkpoint(careless_nodes._Node):
        def run(self) -> tuple[ModelPatcher]:
            host.management.load_models_gpu([patcher])
            return (patcher,)

    host.add(Checkpoint, pack="nodes")
    host.run({"1": node("Checkpoint")})
    target = {"node": "1", "class": "Checkpoint"}

    routes._run(routes.read_park(target))
    assert patcher.loaded_size() == 0
    assert not qmove.is_parked(patcher.model)  # ComfyUI moved it, not qmove
    routes._run(routes.read_restore(target))
    assert patcher.loaded_size() == patcher.model_size()
