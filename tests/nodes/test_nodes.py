"""The six nodes: what they take, what they give, what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qmove_pack.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from qmove_pack.nodes.any_type import ANY
from qmove_pack.nodes.host.models.adopted import adopted_of
from torch import nn

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.dispatched_models import ON_DISK, dispatched
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_of, noted, unwrap, wrap
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

node = careless_nodes.node
GIB = 2**30


@pytest.fixture(autouse=True)
def _nodes(host: FakeHost) -> None:
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL, *NODE_CLASS_MAPPINGS.values())


def call(name: str, **inputs: Any) -> tuple[Any, ...]:
    cls = NODE_CLASS_MAPPINGS[name]
    return getattr(cls(), cls.FUNCTION)(**inputs)["result"]  # type: ignore[attr-defined]


def test_their_names_are_those_of_the_documentation() -> None:
    assert NODE_DISPLAY_NAME_MAPPINGS == {
        "QMovePark": "Park Model (unload to RAM)",
        "QMoveRestore": "Restore Model (load back)",
        "QMoveMaterialize": "Materialize Model",
        "QMoveReport": "Memory Report",
        "QMoveFreeVRAM": "Free VRAM",
        "QMovePin": "Pin Model",
    }
    assert {cls.CATEGORY for cls in NODE_CLASS_MAPPINGS.values()} == {"qmove"}  # type: ignore[attr-defined]


def test_any_wire_fits_any_input() -> None:
    for other in ("IMAGE", "MODEL", "*"):
        differs = other != ANY
        assert not differs


@pytest.mark.parametrize("shape", ["plain", "list", "dict", "pipeline"])
def test_park_takes_whatever_holds_a_model_and_gives_the_same_object_on(
    host: FakeHost, gpu: GPU, shape: str
) -> None:
    value, image = wrap(model_of(16), shape), torch.zeros(1, 8, 8, 3)
    before = gpu.allocated()

    model, after, report, freed, free = call("QMovePark", model=value, after=image)

    assert gpu.allocated() == 0
    assert model is value
    assert after is image
    assert report == f"Parked Sequential: {before / MIB:.2f} MiB left cuda:0."
    assert freed == before / GIB
    assert free == host.management.get_free_memory(torch.device("cuda:0")) / GIB


def test_restore_brings_it_home(host: FakeHost, gpu: GPU) -> None:
    value = wrap(model_of(16), "pipeline")
    before = gpu.allocated()
    call("QMovePark", model=value)

    model, report = call("QMoveRestore", model=value, device="home")

    assert model is value
    assert gpu.allocated() == before
    assert not qmove.is_parked(unwrap(value))
    assert report.startswith("Restored Sequential")
    assert [line.model.model for line in host.management.current_loaded_models] == [unwrap(value)]


def test_restore_to_another_gpu_moves_it_there_and_its_entry_with_it(
    host: FakeHost, gpu: GPU, second_gpu: GPU
) -> None:
    value = model_of(16)
    call("QMovePark", model=value)

    call("QMoveRestore", model=value, device="cuda:1")

    assert gpu.allocated() == 0
    assert second_gpu.allocated() == sum(parameter.nbytes for parameter in value.parameters())
    assert [str(line.device) for line in host.management.current_loaded_models] == ["cuda:1"]


def test_restore_to_the_cpu_leaves_it_there_ready_to_run(host: FakeHost, gpu: GPU) -> None:
    value = model_of(16)
    call("QMoveRestore", model=value, device="cpu")

    assert gpu.allocated() == 0
    assert not qmove.is_parked(value)
    assert value(torch.zeros(1, value[0].in_features)).device.type == "cpu"
    assert host.management.current_loaded_models == []


def test_restore_offers_home_and_the_machines_devices(host: FakeHost) -> None:
    choices = NODE_CLASS_MAPPINGS["QMoveRestore"].INPUT_TYPES()["required"]["device"][0]  # type: ignore[attr-defined]

    assert choices == [
        "home",
        "cpu",
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
    ]


@pytest.mark.parametrize(
    "value", [torch.zeros(1, 8, 8, 3), {"samples": torch.zeros(1, 4, 8, 8)}, "text", None, [1, 2]]
)
def test_an_input_without_a_model_is_told_plainly_and_passed_on(host: FakeHost, value: Any) -> None:
    for name, extra in (
        ("QMovePark", {}),
        ("QMoveRestore", {"device": "home"}),
        ("QMoveMaterialize", {"target_device": "cpu"}),
    ):
        outputs = call(name, model=value, **extra)

        assert outputs[0] is value
        report = outputs[2] if name == "QMovePark" else outputs[1]
        assert "holds no model" in report


def test_comfyuis_own_model_is_parked_by_comfyui(host: FakeHost, gpu: GPU) -> None:
    patcher = ModelPatcher(model_of(16, "cpu"))
    vae = type("VAE", (), {})()
    vae.patcher, vae.first_stage_model = patcher, patcher.model
    host.management.load_models_gpu([patcher])

    _vae, _after, report, freed, _free = call("QMovePark", model=vae)

    assert gpu.allocated() == 0
    assert not qmove.is_parked(patcher.model)
    assert adopted_of(patcher.model) is None
    assert host.management.current_loaded_models == []
    assert "ComfyUI unloaded Sequential" in report
    assert freed == patcher.model_size() / GIB
    call("QMoveRestore", model=vae, device="home")
    assert gpu.allocated() == patcher.loaded_size() > 0


def test_park_waits_for_the_stage_on_its_after_wire_and_is_no_reason_to_run_it_again(
    host: FakeHost, gpu: GPU
) -> None:
    prompt = {
        "load": node("Load", mib=16, shape="plain"),
        "use": node("Use", model=("load", 0), seed=1),
        "park": node("QMovePark", model=("load", 0), after=("use", 0)),
        "next": node("Scratch", mib=1, seed=1, after=("park", 1)),
    }

    host.run(prompt)
    host.run(prompt)

    assert host.ran == ["load", "use", "park", "next"]
    assert noted("scratch 1") == [0]


def test_park_does_not_bring_a_parked_model_home_first(host: FakeHost) -> None:
    prompt = {
        "load": node("Load", mib=16, shape="plain"),
        "park": node("QMovePark", model=("load", 0)),
    }
    host.run(prompt)
    restores = qmove.stats().restores

    host.run(prompt | {"again": node("QMovePark", model=("load", 0), after=("park", 1))})

    assert host.ran == ["load", "park", "again"]
    assert qmove.stats().restores == restores


def test_materialize_gives_a_dispatched_model_its_data(host: FakeHost, tmp_path: Any) -> None:
    model = dispatched(tmp_path, ON_DISK)
    assert qmove.inventory(model).meta

    same, report = call("QMoveMaterialize", model={"model": model}, target_device="cpu")

    assert same["model"] is model
    assert not qmove.inventory(model).meta
    assert report.startswith(f"Materialized {type(model).__name__}: ")


def test_materialize_of_a_whole_model_says_that_there_is_nothing_to_do(host: FakeHost) -> None:
    _model, report = call("QMoveMaterialize", model=model_of(16), target_device="cpu")

    assert report == "Sequential has no meta tensors: nothing to materialize."


def test_the_report_says_who_holds_what_where(host: FakeHost) -> None:
    resident, parked = model_of(16), model_of(8)
    call("QMovePark", model=parked)
    call("QMoveRestore", model=resident, device="home")

    text, picture = call("QMoveReport")

    assert text.splitlines()[0].startswith("cuda:0: ")
    assert (
        f"  Sequential: {sum(p.nbytes for p in resident.parameters()) / MIB:.2f} MiB"
        in text.splitlines()
    )
    assert (
        f"  Sequential (parked from cuda:0): {sum(p.nbytes for p in parked.parameters()) / MIB:.2f} MiB"
        in text.splitlines()
    )
    assert picture.shape[0] == 1
    assert picture.shape[3] == 3
    assert picture.dtype == torch.float32
    assert 0 <= picture.min() < picture.max() <= 1


@pytest.mark.simulated
def test_free_vram_parks_as_few_as_it_can_the_longest_unused_first(
    host: FakeHost, gpu: GPU
) -> None:
    simcuda.set_memory(128 * MIB)
    models: dict[str, nn.Module] = {name: model_of(30) for name in ("old", "middle", "new")}
    for model in models.values():
        host.run({})
        call("QMoveRestore", model=model, device="home")

    _after, report, freed, free = call("QMoveFreeVRAM", gib=60 / 1024)

    assert freed == sum(p.nbytes for p in models["old"].parameters()) / GIB
    assert 60 / 1024 <= free == host.management.get_free_memory(torch.device("cuda:0")) / GIB
    assert [name for name, model in models.items() if qmove.is_parked(model)] == ["old"]
    assert report.startswith("cuda:0: ")


@pytest.mark.simulated
def test_free_vram_says_when_there_is_not_enough_to_free_and_warns(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    simcuda.set_memory(128 * MIB)
    model = model_of(30)
    call("QMoveRestore", model=model, device="home")

    _after, report, freed, free = call("QMoveFreeVRAM", gib=0.5)

    assert qmove.is_parked(model)
    assert "less than the 512.00 MiB asked for" in report
    assert 0 < freed <= free < 0.5
    assert [record.levelname for record in caplog.records if record.message == report] == [
        "WARNING"
    ]


@pytest.mark.simulated
@pytest.mark.parametrize(
    ("card", "gib"), [(24 << 30, 12.0), (6 << 30, 3.0), (640 * MIB, 0.3), (100 * MIB, 0.1)]
)
def test_free_vram_is_for_half_of_the_card_unless_told_otherwise(
    host: FakeHost, card: int, gib: float
) -> None:
    simcuda.set_memory(card, 0)
    simcuda.set_memory(2 * card, 1)  # the smaller one decides

    inputs = NODE_CLASS_MAPPINGS["QMoveFreeVRAM"].INPUT_TYPES()  # type: ignore[attr-defined]

    assert inputs["required"]["gib"][1]["default"] == gib


@pytest.mark.parametrize("word", ["swap", "free memory", "lowvram", "vram", "offload"])
def test_a_search_for_what_people_call_it_finds_park_or_free_vram(word: str) -> None:
    found = {
        name
        for name, cls in NODE_CLASS_MAPPINGS.items()
        if any(word in alias.lower() for alias in cls.SEARCH_ALIASES)  # type: ignore[attr-defined]
    }

    assert {"QMovePark", "QMoveFreeVRAM"} & found
