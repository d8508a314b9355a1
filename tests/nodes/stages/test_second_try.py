"""A node that ran out of memory runs once more by itself, when idle models could make room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.models import residency

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_in, node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _small_card(host: FakeHost) -> None:
    careless_nodes.forget_all()
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL)


@pytest.fixture
def idle(host: FakeHost) -> Any:
    """A model of 60 MiB that no node uses."""
    model = careless_nodes.model_of(60)
    residency.take_in([model])
    return model


def run(host: FakeHost, prompt: dict[str, Any]) -> list[str]:
    """Runs a prompt without an error; returns the nodes in the order in which they ran."""
    host.ran.clear()
    host.run(prompt)
    assert host.errors == []
    return list(host.ran)


def test_two_workflows_in_turn_on_640_mib(host: FakeHost) -> None:
    """At a fifth. Each has a model that takes most of the card, and work that needs the rest."""
    first, second = (
        {
            f"load{i}": node("Load", mib=70 + i, shape="plain"),
            f"work{i}": node("Scratch", mib=40, seed=1, after=(f"load{i}", 0)),
            f"use{i}": node("Use", model=(f"load{i}", 0), seed=1, after=(f"work{i}", 0)),
        }
        for i in (1, 2)
    )
    for _ in range(3):
        run(host, first)
        run(host, second)


def test_work_of_64_then_1600_mib_beside_an_idle_model_of_1500(host: FakeHost) -> None:
    """At a tenth, on a card that has no room for the larger work beside the model."""
    simcuda.set_memory(300 * MIB)
    model = careless_nodes.model_of(150)
    residency.take_in([model])

    def work(mib: int, seed: int) -> list[str]:
        return run(host, {"work": node("Scratch", mib=mib, seed=seed)})

    assert work(6, 1) == ["work"]
    assert not qmove.is_parked(model)
    assert work(160, 2) == ["work", "work"]
    assert qmove.is_parked(model)
    qmove.restore(model)
    assert work(6, 3) == ["work"]
    assert not qmove.is_parked(model)
    assert work(160, 4) == ["work"]  # by now it is known
    assert qmove.is_parked(model)


def test_what_the_first_try_had_allocated_is_free_in_the_second(
    host: FakeHost, idle: Any, gpu: GPU
) -> None:
    allocated: list[int] = []

    class TwoSteps(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            allocated.append(torch.cuda.memory_allocated())
            first = torch.empty(50 * MIB, dtype=torch.uint8, device="cuda:0")
            second = torch.empty(60 * MIB, dtype=torch.uint8, device="cuda:0")
            return (first.nbytes + second.nbytes,)

    host.add(TwoSteps)
    assert run(host, {"steps": node("TwoSteps")}) == ["steps", "steps"]
    assert allocated == [sum(p.nbytes for p in idle.parameters()), 0]


def test_never_twice(host: FakeHost, idle: Any) -> None:
    host.ran.clear()
    host.run({"work": node("Scratch", mib=200, seed=1)})
    assert host.ran == ["work", "work"]
    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]


def test_a_loader_whose_model_finds_no_room(host: FakeHost, idle: Any) -> None:
    assert run(host, {"load": node("Load", mib=100, shape="plain")}) == ["load", "load"]
    loaded = sum(p.nbytes for p in model_in(host, "load").parameters())
    assert torch.cuda.memory_allocated() == loaded  # nothing of the first try is left


def _raises_of_its_own(error: Callable[[], Exception]) -> type:
    class Raises(careless_nodes._Node):
        tries: ClassVar[list[int]] = []

        def run(self) -> tuple[Any]:
            self.tries.append(1)
            if len(self.tries) == 1:
                raise error()
            return (7,)

    return Raises


class AcceleratorError(RuntimeError):
    """As PyTorch has it from 2.8: the driver's own refusal."""

    error_code = 2


def _of_qmove() -> Exception:
    model = careless_nodes.model_of(2)
    qmove.park(model)
    simcuda.set_memory(simcuda.counters(0).allocated + MIB)
    try:
        qmove.restore(model)
    except qmove.NotEnoughMemory as error:
        return error
    finally:
        simcuda.set_memory(128 * MIB)
    raise AssertionError("it should find no room")


@pytest.mark.parametrize(
    "error",
    [
        lambda: torch.OutOfMemoryError("CUDA out of memory."),
        lambda: torch.cuda.OutOfMemoryError("HIP out of memory."),
        lambda: AcceleratorError("CUDA error: unknown"),
        lambda: RuntimeError("CUDA error: out of memory"),
        lambda: RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        lambda: RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB)"),
    ],
    ids=["OutOfMemoryError", "HIP", "AcceleratorError", "driver", "cublas", "mps"],
)
def test_every_face_of_an_out_of_memory(
    host: FakeHost, idle: Any, error: Callable[[], Exception]
) -> None:
    host.add(_raises_of_its_own(error))
    assert run(host, {"node": node("Raises")}) == ["node", "node"]
    assert qmove.is_parked(idle)


def test_an_out_of_memory_behind_another_error(host: FakeHost, idle: Any) -> None:
    def wrapped() -> Exception:
        error = ValueError("the pack could not run its model")
        error.__cause__ = torch.OutOfMemoryError("CUDA out of memory.")
        return error

    host.add(_raises_of_its_own(wrapped))
    assert run(host, {"node": node("Raises")}) == ["node", "node"]


def test_packs_and_comfyui_take_ours_for_an_out_of_memory(gpu: GPU) -> None:
    error = _of_qmove()
    assert isinstance(error, torch.cuda.OutOfMemoryError)
    assert isinstance(error, qmove.NotEnoughMemory) and error.place == "cuda:0"


@pytest.mark.parametrize(
    "error",
    [lambda: ValueError("no"), lambda: RuntimeError("shape mismatch"), lambda: MemoryError()],
    ids=["ValueError", "RuntimeError", "host memory"],
)
def test_not_after_another_error(host: FakeHost, idle: Any, error: Callable[[], Exception]) -> None:
    host.add(_raises_of_its_own(error))
    host.ran.clear()
    host.run({"node": node("Raises")})
    assert host.ran == ["node"]
    assert len(host.errors) == 1
    assert not qmove.is_parked(idle)


class Save(careless_nodes.Scratch):
    OUTPUT_NODE = True


class Roll(careless_nodes.Scratch):
    NOT_IDEMPOTENT = True


@pytest.mark.parametrize("cls", [Save, Roll])
def test_not_where_the_node_does_things_outside(host: FakeHost, idle: Any, cls: type) -> None:
    host.add(cls)
    host.ran.clear()
    host.run({"node": node(cls.__name__, mib=100, seed=1)})
    assert host.ran == ["node"]
    assert len(host.errors) == 1


@pytest.mark.parametrize("name", [settings.RUN_AGAIN, settings.AUTO_PARK])
def test_not_with_the_switch_off(host: FakeHost, idle: Any, name: str) -> None:
    settings.change({name: False})
    host.ran.clear()
    host.run({"work": node("Scratch", mib=100, seed=1)})
    assert host.ran == ["work"]
    assert len(host.errors) == 1


def test_not_where_nothing_is_idle(host: FakeHost) -> None:
    host.ran.clear()
    host.run({"work": node("Scratch", mib=200, seed=1)})
    assert host.ran == ["work"]
    assert len(host.errors) == 1


def test_not_where_it_has_given_results_for_a_part_of_a_list(host: FakeHost, idle: Any) -> None:
    class Sizes(careless_nodes._Node):
        OUTPUT_IS_LIST = (True,)

        def run(self) -> tuple[list[int]]:
            return ([1, 2, 100],)

    host.add(Sizes)
    host.ran.clear()
    host.run({"sizes": node("Sizes"), "work": node("Scratch", mib=("sizes", 0), seed=1)})
    assert host.ran == ["sizes", "work", "work", "work"]  # once for each size
    assert len(host.errors) == 1


def test_a_card_that_is_not_full_is_left_alone(host: FakeHost) -> None:
    here, there = careless_nodes.model_of(60), careless_nodes.model_of(60, "cuda:1")
    residency.take_in([here, there])
    assert run(host, {"work": node("Scratch", mib=100, seed=1)}) == ["work", "work"]
    assert qmove.is_parked(here)
    assert not qmove.is_parked(there)


def test_models_of_the_node_stay(host: FakeHost, idle: Any) -> None:
    class Work(careless_nodes.Use):
        def run(self, model: Any, **_inputs: Any) -> tuple[Any]:  # type: ignore[override]
            torch.empty(60 * MIB, dtype=torch.uint8, device="cuda:0")
            return (str(model[0].weight.device),)

    host.add(Work)
    prompt = {"load": node("Load", mib=40, shape="plain")}
    run(host, prompt)
    prompt["work"] = node("Work", model=("load", 0))
    assert run(host, prompt) == ["work", "work"]
    assert qmove.is_parked(idle)
    assert not qmove.is_parked(model_in(host, "load"))
