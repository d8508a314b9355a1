"""While a node computes, the parked model that the graph needs next begins to come home, if both
have room."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import pytest
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.stages import needs

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, noted
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

node = careless_nodes.node
pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _small_gpu(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    careless_nodes.forget_all()
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL)


def scratch_then_use(host: FakeHost, scratch_mib: int, seed: int) -> dict[str, Any]:
    """A node that needs room of its own, and behind it one that uses a model which was loaded
    before."""
    return {
        "load": node("Load", mib=40, shape="plain"),
        "scratch": node("Scratch", mib=scratch_mib, seed=seed),
        "use": node("Use", model=("load", 0), seed=seed, after=("scratch", 0)),
    }


def run_again_with_the_model_parked(
    host: FakeHost, scratch_mib: int, *, learned: bool = True, memory_mib: int = 128
) -> tuple[int, int]:
    """Returns what lay on the GPU when the scratch node ran, and the model's bytes."""
    host.run(scratch_then_use(host, scratch_mib, seed=1))
    entry = host.cache.entries["load"]
    model = getattr(entry, "outputs", entry)[0][0]
    qmove.park(model)
    if not learned:
        needs.learned = needs.Needs()
    simcuda.set_memory(memory_mib * MIB)
    host.run(scratch_then_use(host, scratch_mib, seed=2))
    assert host.errors == []
    assert not qmove.is_parked(model)
    assert noted("use 2")[0][0] == "cuda:0"
    return noted("scratch 2")[0], qmove.inventory(model).nbytes


def test_the_model_needed_next_comes_home_while_another_node_computes(
    host: FakeHost, gpu: GPU
) -> None:
    on_gpu, nbytes = run_again_with_the_model_parked(host, scratch_mib=8)
    assert on_gpu >= nbytes


def test_not_when_the_running_node_needs_the_room(host: FakeHost, gpu: GPU) -> None:
    on_gpu, nbytes = run_again_with_the_model_parked(host, scratch_mib=100)
    assert on_gpu < nbytes


def test_not_when_nobody_knows_what_the_running_node_needs(host: FakeHost, gpu: GPU) -> None:
    on_gpu, nbytes = run_again_with_the_model_parked(host, scratch_mib=8, learned=False)
    assert on_gpu < nbytes


def test_not_into_the_room_that_is_to_stay_free(host: FakeHost, gpu: GPU) -> None:
    settings.change({settings.VRAM_TO_KEEP_FREE: 80 / 1024})
    on_gpu, nbytes = run_again_with_the_model_parked(host, scratch_mib=8)
    assert on_gpu < nbytes


def test_not_with_the_switch_off(host: FakeHost, gpu: GPU) -> None:
    settings.change({settings.AUTO_PARK: False})
    on_gpu, nbytes = run_again_with_the_model_parked(host, scratch_mib=8)
    assert on_gpu < nbytes


@pytest.mark.parametrize(
    ("learned", "memory_mib", "comes_home"),
    [(True, 128, True), (True, 100, False), (False, 128, False)],
    ids=["both fit", "too little for both", "nobody knows the need"],
)
def test_comfyuis_own_nodes_need_what_they_took_the_last_time(
    host: FakeHost, gpu: GPU, learned: bool, memory_mib: int, comes_home: bool
) -> None:
    """They ask ComfyUI for memory when they run: what came home before would have to go again."""
    host.add(careless_nodes.Scratch, pack="nodes")

    on_gpu, nbytes = run_again_with_the_model_parked(
        host, scratch_mib=60, learned=learned, memory_mib=memory_mib
    )

    assert (on_gpu >= nbytes) is comes_home


def test_comfyuis_own_model_that_a_node_is_about_to_load_is_part_of_its_need(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qmove")
    patcher = ModelPatcher(careless_nodes.model_of(60))

    class Sampler(careless_nodes.Scratch):
        INPUTS: ClassVar[dict[str, Any]] = {"own": ("*", {}), **careless_nodes.Scratch.INPUTS}

        def run(self, own: Any, mib: int, **inputs: Any) -> tuple[Any]:  # type: ignore[override]
            host.management.load_models_gpu([own])
            return super().run(mib, **inputs)

    class LoadOwn(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            return (patcher,)

    host.add(Sampler, LoadOwn, pack="nodes")
    prompt = {
        "load": node("Load", mib=40, shape="plain"),
        "own": node("LoadOwn"),
        "scratch": node("Sampler", own=("own", 0), mib=8, seed=1),
        "use": node("Use", model=("load", 0), seed=1, after=("scratch", 0)),
    }
    host.run(prompt)
    qmove.park(careless_nodes.model_in(host, "load"))
    host.management.unload_all_models()
    simcuda.set_memory(104 * MIB)
    signature = needs.Signature("Sampler", (("mib", 8),))
    needs.learned = needs.Needs()
    needs.learned.learn(signature, {gpu.device: 8 * MIB}, {})  # own was loaded then
    for name in ("scratch", "use"):
        prompt[name]["inputs"]["seed"] = 2
    host.run(prompt)

    assert host.errors == []
    assert noted("use 2")[0][0] == "cuda:0"
    assert noted("scratch 2") == [patcher.model_size()]
    assert "begins to come home" not in caplog.text
