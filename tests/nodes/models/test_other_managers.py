"""Other managers of the same VRAM: purge nodes, and packs that move parts of a model themselves.

No wrong bytes and no crash; what a purge has destroyed is named; whole models are in ComfyUI's list
again before it next loads one of its own; and what another manager moves is left to it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host.models import finding, residency
from qmove_pack.nodes.host.models.adopted import adopted_models, adopted_of
from qmove_pack.nodes.host.panel import state
from qmove_pack.nodes.host.stages import requests
from qmove_pack.nodes.memory_picture import write_text

import qmove_core as qmove
import simcuda
from tests.nodes.builders import careless_nodes, managed_models
from tests.nodes.builders.careless_nodes import MIB, model_in, model_of, node
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

pytestmark = pytest.mark.simulated
DEVICE = torch.device("cuda:0")


class Purge(careless_nodes._Node):
    """Empties the storage of every tensor that the collector finds."""

    INPUTS: ClassVar[dict[str, Any]] = {"after": ("*", {}), "seed": ("INT", {})}

    def run(self, after: Any = None, seed: int = 0) -> tuple[Any]:
        for obj in gc.get_objects():
            try:
                if isinstance(obj, torch.Tensor) and obj.is_cuda:
                    obj.untyped_storage().resize_(0)
            except Exception:  # as they do
                continue
        torch.cuda.empty_cache()
        return (seed,)


class Clear(careless_nodes._Node):
    """Empties ComfyUI's list of loaded models, and may then load one of ComfyUI's own."""

    INPUTS: ClassVar[dict[str, Any]] = {"after": ("*", {}), "seed": ("INT", {})}
    how = staticmethod(lambda management: management.current_loaded_models.clear())
    patcher: ClassVar[Any] = None

    def run(self, after: Any = None, seed: int = 0) -> tuple[Any]:
        management = _management()
        type(self).how(management)
        if self.patcher is not None:
            management.load_models_gpu([self.patcher])
        return (seed,)


class LoadOwn(careless_nodes._Node):
    INPUTS: ClassVar[dict[str, Any]] = {"after": ("*", {}), "seed": ("INT", {})}
    patcher: ClassVar[Any] = None

    def run(self, after: Any = None, seed: int = 0) -> tuple[Any]:
        _management().load_models_gpu([self.patcher])
        return (seed,)


def _management() -> Any:
    import sys

    return sys.modules["comfy.model_management"]


@pytest.fixture(autouse=True)
def _small_card(host: FakeHost) -> None:
    careless_nodes.forget_all()
    finding.forget_all()
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL, Purge, Clear, LoadOwn)


def using(seed: int, **after: Any) -> dict[str, Any]:
    return {
        "load": node("Load", mib=60, shape="plain"),
        "use": node("Use", model=("load", 0), seed=seed, **after),
    }


# Purge nodes --------------------------------------------------------------------------------------


@pytest.fixture
def loaded(host: FakeHost) -> Any:
    """A model of 60 MiB that has run, and what it gave."""
    (value,) = host.run(using(1))["use"][0]
    return model_in(host, "load"), value


def purge(host: FakeHost) -> None:
    prompt = {"load": node("Load", mib=60, shape="plain"), "purge": node("Purge", seed=1)}
    host.run(prompt)
    assert host.errors == []


@pytest.mark.parametrize("state_before", ["resident", "mirrored", "woken by streaming"])
def test_what_a_purge_destroyed_is_named_by_the_error_the_report_and_a_park(
    host: FakeHost, loaded: Any, state_before: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = loaded
    if state_before != "resident":
        qmove.park(model)
        qmove.restore(model, stream=state_before != "mirrored")
    purge(host)

    host.run(using(2))

    assert [type(error) for error in host.errors] == [RuntimeError]  # PyTorch's own
    assert host.said.startswith(str(host.errors[0]))
    assert "8 of the tensors of Sequential have no bytes any more (0.weight, 0.bias" in host.said
    (shown,) = state.snapshot()["models"]
    assert shown["lost"][:2] == ["0.weight", "0.bias"]
    assert "0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 3 more lost" in write_text(
        state.snapshot()
    )
    with caplog.at_level(logging.WARNING, "qmove"):
        assert qmove.park(model).emptied == [
            f"{i}.{n}" for i in range(4) for n in ("weight", "bias")
        ]
    assert "0.weight, 0.bias" in caplog.text
    assert qmove.restore(model).nbytes == 0


def test_a_parked_model_survives_a_purge_bit_for_bit(host: FakeHost, loaded: Any) -> None:
    model, value = loaded
    residency.park(adopted_models())
    purge(host)

    outputs = host.run(using(1) | {"use2": node("Use", model=("load", 0), seed=1)})

    assert host.errors == []
    assert outputs["use2"] == [[value]]
    assert adopted_of(model).lost == []


def test_the_rest_of_a_model_that_was_half_destroyed_still_moves(
    host: FakeHost, loaded: Any
) -> None:
    model, _ = loaded
    model[0].weight.untyped_storage().resize_(0)
    kept = model[1].weight.clone()

    residency.park(adopted_models())
    residency.bring_home(adopted_models())

    assert adopted_of(model).lost == ["0.weight"]
    assert torch.equal(model[1].weight, kept)


def test_after_a_purge_another_model_loads_runs_and_yields_as_ever(
    host: FakeHost, loaded: Any
) -> None:
    del loaded
    purge(host)
    for seed in (10, 20):
        host.run(careless_nodes.stages(3, 76, seed=seed))
        assert host.errors == []
    assert len(host.management.current_loaded_models) == 1


def test_a_weight_of_comfyuis_own_model_that_a_purge_destroyed_is_named(host: FakeHost) -> None:
    patcher = ModelPatcher(model_of(20))

    class Sample(careless_nodes._Node):
        INPUTS: ClassVar[dict[str, Any]] = {"model": ("MODEL", {})}

        def run(self, model: Any) -> tuple[Any]:
            model.model(torch.zeros(1, model.model[0].in_features, device=DEVICE))
            return (1,)

    class Give(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            patcher.model[2].weight.untyped_storage().resize_(0)
            return (patcher,)

    host.add(Sample, Give)
    residency.take_in([model_of(1)])
    host.run({"give": node("Give"), "sample": node("Sample", model=("give", 0))})

    assert "1 of the tensors of Sequential have no bytes any more (2.weight)" in host.said


# ComfyUI's list, emptied ---------------------------------------------------------------------------


def replaced(management: Any) -> None:
    management.current_loaded_models = []


def without_ours(management: Any) -> None:
    lines = management.current_loaded_models
    lines[:] = [line for line in lines if isinstance(line.model, ModelPatcher)]


CLEARED: dict[str, Callable[[Any], None]] = {
    "cleared": lambda management: management.current_loaded_models.clear(),
    "replaced": replaced,
    "without ours": without_ours,
}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModelPatcher:
    """A model of ComfyUI's own that has no room beside ours."""
    return ModelPatcher(model_of(90, "cpu"))


@pytest.mark.parametrize("how", CLEARED)
@pytest.mark.parametrize("within", ["between two nodes", "during one"])
def test_a_whole_model_is_in_the_list_again_before_comfyui_next_loads_its_own(
    host: FakeHost, own: ModelPatcher, how: str, within: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Clear, "how", staticmethod(CLEARED[how]))
    monkeypatch.setattr(Clear if within == "during one" else LoadOwn, "patcher", own)
    prompt = using(1) | {"clear": node("Clear", after=("use", 0))}
    if within != "during one":
        prompt["own"] = node("LoadOwn", after=("clear", 0))
    host.add(Clear, LoadOwn, pack="nodes")  # ComfyUI's own nodes: qmove makes no room for them

    host.run(prompt)

    assert host.errors == []
    assert host.ran == list(prompt)  # none ran twice
    assert own.loaded_size() == own.model_size()
    assert qmove.is_parked(model_in(host, "load"))
    assert [line.model for line in host.management.current_loaded_models] == [own]


def test_one_that_left_the_list_in_order_is_not_listed_again(host: FakeHost) -> None:
    """Parked, evicted, moved off by its owner, or dead: only what somebody else has taken out."""
    parked, _evicted, moved, _kept = models = [model_of(8) for _ in range(4)]
    residency.take_in(models)
    residency.park([adopted_of(parked)])
    host.management.free_memory(torch.cuda.mem_get_info()[0] + MIB, DEVICE)
    moved.to("cpu")
    residency.register(adopted_models())
    expected = [line.model for line in host.management.current_loaded_models]
    assert 0 < len(expected) < 3

    host.management.current_loaded_models.clear()
    host.management.free_memory(0, DEVICE)

    listed = [line.model for line in host.management.current_loaded_models]
    assert {id(entry) for entry in listed} == {id(entry) for entry in expected}


# Those that move parts of a model themselves --------------------------------------------------------


@pytest.fixture
def alone(kind: str) -> list[float]:
    """What the model gives without the pack, in three runs."""
    torch.manual_seed(0)
    model = managed_models.ALL[kind](40)
    return [compute(model, seed) for seed in range(3)]


def compute(model: Any, seed: int) -> float:
    with torch.no_grad():
        x = torch.full((1, model.in_features), float(seed + 1), device=DEVICE)
        return model(x).sum().item()


class RunManaged(careless_nodes._Node):
    INPUTS: ClassVar[dict[str, Any]] = {"model": ("*", {}), "seed": ("INT", {}), "after": ("*", {})}

    def run(self, model: Any, seed: int, after: Any = None) -> tuple[Any]:
        return (compute(model, seed),)


def prompt_of(host: FakeHost, kind: str) -> dict[str, Any]:
    class LoadManaged(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            torch.manual_seed(0)
            return (managed_models.ALL[kind](40),)

    host.add(LoadManaged, RunManaged)
    return {"load": node("LoadManaged")} | {
        f"run{seed}": node("RunManaged", model=("load", 0), seed=seed, after=(f"run{seed - 1}", 0))
        if seed
        else node("RunManaged", model=("load", 0), seed=seed)
        for seed in range(3)
    }


@pytest.mark.parametrize("kind", managed_models.ALL)
def test_it_gives_the_same_beside_models_that_come_and_go(
    host: FakeHost, alone: list[float], kind: str
) -> None:
    prompt = prompt_of(host, kind)
    for number in range(2):  # 100 MiB in 128: it has no room beside this one
        prompt[f"big{number}"] = node("Load", mib=60, shape="plain", after=(f"run{number}", 0))
        use = node("Use", model=(f"big{number}", 0), seed=1)
        prompt[f"use{number}"] = use
        prompt[f"run{number + 1}"]["inputs"]["after"] = [f"use{number}", 0]

    outputs = host.run(prompt)

    assert host.errors == []
    assert [outputs[f"run{seed}"][0][0] for seed in range(3)] == alone


@pytest.mark.parametrize("kind", managed_models.ALL)
def test_parked_by_hand_between_its_runs_it_gives_the_same(
    host: FakeHost, alone: list[float], kind: str
) -> None:
    prompt = prompt_of(host, kind)
    values = []
    for seed in range(3):
        outputs = host.run({"load": prompt["load"], "run": prompt[f"run{seed}"]
                            | {"inputs": {"model": ["load", 0], "seed": seed}}})  # fmt: skip
        assert host.errors == []
        values += outputs["run"][0]
        requests.park_value(outputs["load"][0][0])

    assert values == alone


@pytest.mark.parametrize("kind", managed_models.MARKED)
def test_auto_parking_adopts_and_moves_nothing_of_it(host: FakeHost, kind: str) -> None:
    host.run(prompt_of(host, kind))
    requests.free_vram(1 << 40)

    assert host.errors == []
    assert adopted_models() == []
    assert qmove.parked_models() == []


def test_one_that_another_manager_takes_over_later_is_left_to_it(host: FakeHost) -> None:
    """The user may still park it by hand."""
    model = model_of(40)
    (adopted,) = residency.take_in([model])
    model.blocks_to_swap = 2

    host.management.free_memory(1e30, DEVICE)
    requests.free_vram(1 << 40)
    assert not qmove.is_parked(model)

    requests.park_models([adopted])
    assert qmove.is_parked(model)


def test_a_model_of_comfyuis_own_over_two_gpus_is_left_to_its_pack(host: FakeHost) -> None:
    """As MultiGPU packs place it: some of it where ComfyUI does not look."""
    model = torch.nn.ModuleList([model_of(20, "cuda:0"), model_of(20, "cuda:1")])
    patcher = ModelPatcher(model)
    host.management.load_models_gpu([patcher])
    model[1].to("cuda:1")

    class Give(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            return (patcher,)

    host.add(Give)
    host.run({"give": node("Give"), **using(1)})

    assert host.errors == []
    assert [adopted.name for adopted in adopted_models()] == ["Sequential"]
    assert [str(part[0].weight.device) for part in model] == ["cuda:0", "cuda:1"]
