"""Auto-parking: what is parked before a node, and what is not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import comfy, settings
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.stages import auto_parking, needs

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_in, noted, stages
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

node = careless_nodes.node
pytestmark = pytest.mark.simulated  # the stories are about a GPU that is too small


@pytest.fixture(autouse=True)
def _small_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    careless_nodes.forget_all()
    simcuda.set_memory(128 * MIB)
    if "host" in request.fixturenames:
        request.getfixturevalue("host").add(*careless_nodes.ALL)


def parked_nodes(host: FakeHost) -> set[str]:
    return {
        name
        for name in host.cache.entries
        if name.startswith("load") and qmove.is_parked(model_in(host, name))
    }


def test_without_it_the_second_loader_runs_out_of_memory(host: FakeHost) -> None:
    settings.change({settings.AUTO_PARK: False})

    host.run(stages(3, 76))

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert noted("load") == [77]


def test_with_it_three_models_of_60_percent_each_run_in_turn_five_times(
    host: FakeHost, gpu: GPU
) -> None:
    alone = []
    for stage in (1, 2, 3):
        load, use = (
            node("Load", mib=76 + stage, shape="plain"),
            node("Use", model=("load", 0), seed=stage),
        )
        alone.append(host.run({"load": load, "use": use})["use"])
    host.run({})
    for time in range(5):
        careless_nodes.seen.clear()
        outputs = host.run(stages(3, 76, seed=0 if time == 0 else time * 10))
        assert host.errors == []
        if time == 0:
            assert [outputs[f"use{i}"] for i in (1, 2, 3)] == alone
        for stage in (1, 2, 3):
            ((device, allocated),) = noted(f"use {time * 10 + stage}")
            model = model_in(host, f"load{stage}")
            assert (device, allocated) == ("cuda:0", sum(p.nbytes for p in model.parameters()))


def test_a_node_that_never_ran_moves_nothing_where_everything_fits(
    host: FakeHost, gpu: GPU
) -> None:
    prompt = {
        "load1": node("Load", mib=8, shape="plain"),
        "load2": node("Load", mib=9, shape="plain", after=("load1", 0)),
    }
    host.run(prompt)
    nbytes = sum(p.nbytes for name in prompt for p in model_in(host, name).parameters())

    host.run({**prompt, "scratch": node("Scratch", mib=1, seed=7)})

    assert noted("scratch 7") == [nbytes]
    assert parked_nodes(host) == set()


def test_a_node_whose_need_is_known_and_met_parks_nothing(host: FakeHost) -> None:
    prompt = {
        "load1": node("Load", mib=16, shape="plain"),
        "scratch": node("Scratch", mib=40, seed=1),
    }
    host.run(prompt)
    model = model_in(host, "load1")
    qmove.restore(model)

    prompt["scratch"]["inputs"]["seed"] = 2
    host.run(prompt)

    assert noted("scratch 2") == [sum(p.nbytes for p in model.parameters())]


def test_a_known_need_frees_what_is_lacking_and_no_more(host: FakeHost) -> None:
    prompt = {
        "load1": node("Load", mib=30, shape="plain"),
        "load2": node("Load", mib=31, shape="plain", after=("load1", 0)),
        "scratch": node("Scratch", mib=70, seed=1),
    }
    host.run(prompt)
    for name in ("load1", "load2"):
        qmove.restore(model_in(host, name))

    prompt["scratch"]["inputs"]["seed"] = 2
    host.run(prompt)

    assert host.errors == []
    assert len(parked_nodes(host)) == 1


def test_another_file_on_the_node_needs_what_is_like_it_and_room_for_the_file(
    host: FakeHost, tmp_path: Path
) -> None:
    big = tmp_path / "big.safetensors"
    with big.open("wb") as file:
        file.truncate(120 * MIB)
    host.model_files["big.safetensors"] = str(big)
    prompt = {
        "load1": node("Load", mib=16, shape="plain"),
        "scratch": node("Scratch", mib=40, seed=1, file="small.safetensors"),
    }
    host.run(prompt)
    assert parked_nodes(host) == set()

    prompt["scratch"]["inputs"] |= {"seed": 2, "file": "big.safetensors"}
    host.run(prompt)

    assert noted("scratch 2") == [0]
    prompt["scratch"]["inputs"] |= {"seed": 3}  # by now it is known that it takes less
    qmove.restore(model_in(host, "load1"))
    host.run(prompt)
    assert noted("scratch 3") == [sum(p.nbytes for p in model_in(host, "load1").parameters())]


def test_what_no_remaining_node_uses_goes_first_then_what_is_used_farthest_ahead(
    host: FakeHost,
) -> None:
    loads = {f"load{i}": node("Load", mib=24 + i, shape="plain") for i in (1, 2, 3)}
    scratch = {"scratch": node("Scratch", mib=40, seed=1)}
    uses = {
        "use1": node("Use", model=("load1", 0), seed=1, after=("scratch", 0)),
        "between": node("Scratch", mib=1, seed=5, after=("use1", 0)),
        "use2": node("Use", model=("load2", 0), seed=1, after=("between", 0)),
    }
    host.run({**loads, **scratch})  # the scratch node's need is known from here on

    def parked_before_scratch(mib: int, rest: dict[str, Any]) -> set[str]:
        for name in loads:
            qmove.restore(model_in(host, name))
        order: list[set[str]] = []

        class Look:
            FUNCTION = "run"

            @classmethod
            def INPUT_TYPES(cls) -> dict[str, Any]:
                return {"required": {"mib": ("INT", {}), "seed": ("INT", {})}}

            def run(self, **_inputs: Any) -> tuple[int]:
                order.append(parked_nodes(host))
                return (0,)

        host.add(Look)
        signature = needs.Signature("Look", (("mib", mib),))
        needs.learned.learn(signature, {torch.device("cuda:0"): mib * MIB}, {})
        host.run({**loads, "scratch": node("Look", mib=mib, seed=mib), **rest})
        return order[0]

    assert parked_before_scratch(60, uses) == {"load3"}
    assert parked_before_scratch(88, uses) == {"load3", "load2"}


def test_a_nodes_own_models_are_never_parked_for_it(host: FakeHost) -> None:
    prompt = {
        "load1": node("Load", mib=40, shape="plain"),
        "load2": node("Load", mib=41, shape="dict"),
        "both": node("Both", first=("load1", 0), second=("load2", 0)),
    }

    host.run(prompt)

    assert noted("both") == [["cuda:0", "cuda:0"]]
    assert parked_nodes(host) == set()


def test_comfyuis_own_nodes_ask_for_memory_themselves_so_nothing_is_parked_for_them(
    host: FakeHost,
) -> None:
    class EmptyImage(careless_nodes.Scratch):
        pass

    host.add(EmptyImage, pack="nodes")
    prompt = {
        "load1": node("Load", mib=40, shape="plain"),
        "scratch": node("EmptyImage", mib=1, seed=3),
    }

    host.run(prompt)

    assert parked_nodes(host) == set()


def test_comfyuis_own_models_make_room_for_a_node_that_does_not_ask(
    host: FakeHost, gpu: GPU
) -> None:
    patcher = ModelPatcher(careless_nodes.model_of(60, "cpu"))
    host.management.load_models_gpu([patcher])
    assert gpu.allocated() > 0

    host.run({"load1": node("Load", mib=76, shape="plain")})

    assert host.errors == []
    assert host.ran == ["load1", "load1"]  # nobody knew its need: it ran again
    assert patcher.loaded_size() == 0
    assert patcher not in [line.model for line in host.management.current_loaded_models]


def test_models_that_yield_by_themselves_are_left_to_comfyui(host: FakeHost, gpu: GPU) -> None:
    patcher = ModelPatcher(careless_nodes.model_of(16, "cpu"))
    patcher.is_dynamic = lambda: True  # type: ignore[method-assign]
    host.management.load_models_gpu([patcher])
    settings.change({settings.AUTO_PARK_WHEN: settings.STAGE})

    host.run({"load1": node("Load", mib=16, shape="plain")})

    assert patcher.loaded_size() == patcher.model_size()


def test_a_model_that_wakes_in_the_middle_of_a_node_makes_others_go_but_not_those_of_the_node(
    host: FakeHost,
) -> None:
    hidden, idle = careless_nodes.model_of(50), careless_nodes.model_of(50)
    residency.park(residency.take_in([hidden]))

    class UseHidden(careless_nodes.Use):
        def run(self, model: Any, **_inputs: Any) -> tuple[Any]:  # type: ignore[override]
            residency.take_in([idle.to("cuda:0")])
            hidden(torch.zeros(1, hidden[0].in_features, device="cuda:0"))
            return (model[0].weight.device.type,)

    idle.to("cpu")
    host.add(UseHidden)
    outputs = host.run(
        {"load1": node("Load", mib=50, shape="plain"), "use": node("UseHidden", model=("load1", 0))}
    )

    assert host.errors == []
    assert outputs["use"] == [["cuda"]]
    assert qmove.is_parked(idle)
    assert not qmove.is_parked(hidden)


def test_when_it_parks_at_each_stage_only_what_the_node_uses_is_on_the_gpu(host: FakeHost) -> None:
    settings.change({settings.AUTO_PARK_WHEN: "stage"})

    host.run(stages(3, 10))

    for stage in (1, 2, 3):
        ((_device, allocated),) = noted(f"use {stage}")
        assert allocated == sum(p.nbytes for p in model_in(host, f"load{stage}").parameters())


def test_without_a_second_try_an_out_of_memory_parks_all_and_says_what_was_lacking(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    settings.change({settings.RUN_AGAIN: False})
    prompt = {
        "load1": node("Load", mib=60, shape="plain"),
        "scratch": node("Scratch", mib=1, seed=1),
    }
    host.run(prompt)
    qmove.restore(model_in(host, "load1"))
    prompt["scratch"]["inputs"] |= {"mib": 100, "seed": 2}  # more than it took the last time

    with caplog.at_level(logging.ERROR, "qmove"):
        host.run(prompt)

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert gpu.allocated() == 0
    assert "scratch (Scratch) ran out of memory" in caplog.text
    assert "100.00 MiB" in caplog.text
    qmove.restore(model_in(host, "load1"))
    prompt["scratch"]["inputs"]["seed"] = 3  # it is known to need more than was free
    host.run(prompt)
    assert host.errors == []


def test_an_out_of_memory_is_logged_and_the_need_remembered_also_where_nothing_can_be_parked(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    host.run({"load1": node("Load", mib=60, shape="plain")})
    host.run({"load1": node("Load", mib=60, shape="plain"), "s": node("Scratch", mib=1, seed=1)})
    qmove.restore(model_in(host, "load1"))
    settings.change({settings.KEEP_MIRRORS: False, settings.RAM_LIMIT: 1 / 1024})

    host.run({"load1": node("Load", mib=60, shape="plain"), "s": node("Scratch", mib=100, seed=2)})

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert "s (Scratch) ran out of memory" in caplog.text
    taken, exactly = needs.learned.known(needs.Signature("Scratch", (("mib", 100),))) or ({}, False)
    assert exactly and taken[gpu.device] > 60 * MIB


def test_nothing_that_a_node_freed_is_held_by_qmove(host: FakeHost, gpu: GPU) -> None:
    host.run(stages(2, 20))

    host.run({})

    assert gpu.allocated() == 0
    assert qmove.stats().arena_bytes == 0
    assert comfy.model_management().current_loaded_models == []  # type: ignore[union-attr]


@pytest.mark.parametrize(("keep_free", "parked"), [(0, 0), (60, 1), (120, 2)])
def test_vram_to_keep_free_is_free_before_a_node_and_no_more_is_parked_than_that_takes(
    host: FakeHost, gpu: GPU, keep_free: int, parked: int
) -> None:
    """Of 128 MiB two idle models take 40 each; the node is ComfyUI's own and needs none of it."""
    host.add(careless_nodes.Scratch, pack="nodes")
    models = [careless_nodes.model_of(40), careless_nodes.model_of(40)]
    residency.take_in(models)
    settings.change({settings.VRAM_TO_KEEP_FREE: keep_free / 1024})

    host.run({"scratch": node("Scratch", mib=1)})

    assert [qmove.is_parked(model) for model in models].count(True) == parked
    assert torch.cuda.mem_get_info()[0] >= keep_free * MIB


@pytest.mark.parametrize(("keep_free", "parked"), [(0, 1), (40, 2)])
def test_vram_to_keep_free_stays_free_when_a_model_wakes_in_the_middle_of_a_node(
    host: FakeHost, keep_free: int, parked: int
) -> None:
    models = [careless_nodes.model_of(40), careless_nodes.model_of(40)]
    residency.take_in(models)
    settings.change({settings.VRAM_TO_KEEP_FREE: keep_free / 1024})

    auto_parking.give_room(torch.device("cuda:0"), 60 * MIB)

    assert [qmove.is_parked(model) for model in models].count(True) == parked
