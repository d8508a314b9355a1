"""After an out-of-memory: models leave the device that was full, and no other; the second try is
measured by itself."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.stages import needs
from qmove_pack.nodes.host.stages.needs import Signature

import qmove_core as qmove
import simcuda
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _two_cards(host: FakeHost) -> Any:
    careless_nodes.forget_all()
    simcuda.set_memory(128 * MIB)
    simcuda.set_memory(128 * MIB, device=1)
    host.add(*careless_nodes.ALL, Fill)
    yield
    simcuda.set_memory("4GiB", device=1)


class Fill(careless_nodes._Node):
    """Takes room on one device in four pieces, as a node does that runs out of memory half-way."""

    INPUTS: ClassVar[dict[str, Any]] = {"mib": ("INT", {}), "device": (["cuda:0", "cuda:1"], {})}

    def run(self, mib: int, device: str = "cuda:0") -> tuple[Any]:
        pieces = [torch.empty(mib * MIB // 4, dtype=torch.uint8, device=device) for _ in range(4)]
        return (len(pieces),)


def idle_models() -> tuple[Any, Any]:
    """A model of 60 MiB on each card that no node of the prompt uses."""
    models = careless_nodes.model_of(60), careless_nodes.model_of(60, "cuda:1")
    residency.take_in(models)
    return models


def listed(host: FakeHost) -> list[Any]:
    return [line.model.model for line in host.management.current_loaded_models]


@pytest.mark.parametrize(("full", "stays"), [(0, 1), (1, 0)])
def test_the_second_try_parks_on_the_device_that_was_full_alone(
    host: FakeHost, full: int, stays: int
) -> None:
    models = idle_models()

    host.run({"fill": node("Fill", mib=100, device=f"cuda:{full}")})

    assert host.errors == []
    assert host.ran == ["fill", "fill"]
    assert qmove.is_parked(models[full])
    assert not qmove.is_parked(models[stays])
    assert listed(host) == [models[stays]]


@pytest.mark.parametrize("again", [True, False], ids=["second try", "no second try"])
def test_an_out_of_memory_that_stays_leaves_models_on_other_devices(
    host: FakeHost, again: bool
) -> None:
    """ComfyUI itself then unloads all models of all devices."""
    settings.change({settings.RUN_AGAIN: again})
    on_full, elsewhere = idle_models()

    host.run({"fill": node("Fill", mib=400)})

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert host.ran == ["fill"] * (2 if again else 1)
    assert qmove.is_parked(on_full)
    assert not qmove.is_parked(elsewhere)
    assert listed(host) == [elsewhere]
    host.management.free_memory(1e30, SECOND)  # and it is ComfyUI's to evict again
    assert qmove.is_parked(elsewhere)


def test_the_need_is_that_of_the_second_try_not_all_that_was_free(host: FakeHost) -> None:
    """Known as it is, it moves nothing where it fits, and in the next shortage no more than it
    takes."""
    models = [careless_nodes.model_of(24) for _ in range(4)]
    residency.take_in(models)
    host.run({"fill": node("Fill", mib=60)})
    assert host.errors == [] and host.ran == ["fill", "fill"]

    need, exactly = needs.learned.known(Signature("Fill", (("mib", 60),))) or ({}, False)

    assert exactly and 60 * MIB <= need[FIRST] <= 70 * MIB
    for model in models:
        qmove.restore(model)
    residency.register_woken()
    host.cache.entries.clear()
    host.ran.clear()
    host.run({"fill": node("Fill", mib=60)})
    assert host.ran == ["fill"]
    assert [qmove.is_parked(model) for model in models].count(True) == 2
