"""While a node computes, the parked model that the graph needs next begins to come home, if both have room."""

from __future__ import annotations

from typing import Any

import pytest
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.stages import needs

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, noted
from tests.nodes.builders.fake_host import FakeHost

node = careless_nodes.node
pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _small_gpu(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    careless_nodes.forget_all()
    monkeypatch.setattr(needs, "_learned", {})
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL)


def scratch_then_use(host: FakeHost, scratch_mib: int, seed: int) -> dict[str, Any]:
    """A node that needs room of its own, and behind it one that uses a model which was loaded before."""
    return {
        "load": node("Load", mib=40, shape="plain"),
        "scratch": node("Scratch", mib=scratch_mib, seed=seed),
        "use": node("Use", model=("load", 0), seed=seed, after=("scratch", 0)),
    }


def run_again_with_the_model_parked(
    host: FakeHost, scratch_mib: int, *, learned: bool = True
) -> tuple[int, int]:
    """Returns what lay on the GPU when the scratch node ran, and the model's bytes."""
    host.run(scratch_then_use(host, scratch_mib, seed=1))
    entry = host.cache.entries["load"]
    model = getattr(entry, "outputs", entry)[0][0]
    qmove.park(model)
    if not learned:
        needs._learned.clear()
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
