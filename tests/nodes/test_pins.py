"""Pins in ComfyUI: nobody parks a pinned model, nobody touches one that qmove is to leave alone, and
both last until somebody says otherwise."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qmove_pack.nodes import NODE_CLASS_MAPPINGS
from qmove_pack.nodes.host import browser, routes
from qmove_pack.nodes.host.models import finding, holders, pins, residency
from qmove_pack.nodes.host.models.adopted import Adopted, adopted_models, adopted_of
from qmove_pack.nodes.host.panel import events, state
from qmove_pack.nodes.host.stages import pinning, requests
from torch import nn

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.places import places
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, Pipeline, model_in, model_of, node, stages
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

pytestmark = pytest.mark.simulated

STAYS = [pins.PIN, "cuda:0", pins.FORGET]


@pytest.fixture(autouse=True)
def _small_gpu(host: FakeHost) -> None:
    careless_nodes.forget_all()
    finding.forget_all()
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL, *NODE_CLASS_MAPPINGS.values())


def known(mib: int, choice: str = pins.UNPIN) -> tuple[nn.Sequential, Adopted]:
    """A model that qmove knows, and for which this was chosen."""
    model = model_of(mib)
    (adopted,) = residency.take_in([model])
    if choice != pins.UNPIN:
        pinning.pin_models([adopted], choice)
    return model, adopted


def listed(host: FakeHost) -> list[Any]:
    return [line.model.model for line in host.management.current_loaded_models]


def call(name: str, **inputs: Any) -> str:
    cls = NODE_CLASS_MAPPINGS[name]
    return getattr(cls(), cls.FUNCTION)(**inputs)["result"][1 if name != "QMovePark" else 2]  # type: ignore[attr-defined]


def report_of_memory() -> str:
    return NODE_CLASS_MAPPINGS["QMoveReport"]().report()["result"][0]  # type: ignore[attr-defined]


ASKS: dict[str, Callable[[FakeHost, Any, Adopted], Any]] = {
    "Park Model": lambda host, model, adopted: call("QMovePark", model=model),
    "Free VRAM": lambda host, model, adopted: call("QMoveFreeVRAM", gib=64.0),
    "the panel's Park": lambda host, model, adopted: routes.read_park(
        {"models": [adopted.number]}
    )(),
    "Park all": lambda host, model, adopted: routes.read_park({"models": "all"})(),
    "the panel's Free": lambda host, model, adopted: routes.read_free({"gib": 64})(),
    "ComfyUI's eviction": lambda host, model, adopted: host.management.free_memory(
        1e30, torch.device("cuda:0")
    ),
    "POST /free": lambda host, model, adopted: host.management.unload_all_models(),
    "a node's need": lambda host, model, adopted: host.run(
        {"work": node("Scratch", mib=64, file="none", seed=1)}
    ),
    "Restore Model to another GPU": lambda host, model, adopted: call(
        "QMoveRestore", model=model, device="cuda:1"
    ),
}


@pytest.mark.parametrize("choice", STAYS)
@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
def test_whoever_asks_a_pinned_model_stays(
    host: FakeHost, gpu: GPU, ask: Callable[..., Any], choice: str
) -> None:
    model, adopted = known(16, choice)

    ask(host, model, adopted)

    assert {parameter.device for parameter in model.parameters()} == {gpu.device}
    assert places(model) == {"cuda"} and not qmove.is_parked(model)
    assert host.errors == []
    assert pins.choice_of(adopted) == choice


@pytest.mark.parametrize("choice", STAYS)
def test_the_others_are_parked_and_the_report_says_why_it_stays(
    host: FakeHost, choice: str
) -> None:
    model, adopted = known(16, choice)
    other, _ = known(17)

    report = requests.park_all()

    assert places(model) == {"cuda"} and places(other) == {"cpu"}
    words = {"pin": "pinned", "cuda:0": "kept on cuda:0", "forget": "left alone, as you asked"}
    assert f"Sequential is {words[choice]}: it stays as it is. To change that, unpin it" in report
    assert pins.in_words(adopted) == words[choice]


@pytest.mark.parametrize("choice", STAYS)
def test_an_eviction_finds_it_nowhere_frees_nothing_of_it_and_says_nothing(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture, choice: str
) -> None:
    model, _ = known(16)
    assert listed(host) == [model]
    pinning.pin_value(model, choice)
    before = gpu.allocated()
    caplog.clear()

    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert host.management.free_memory(1e30, gpu.device) == []

    assert listed(host) == [] and gpu.allocated() == before
    assert caplog.records == []
    pinning.pin_value(model, pins.UNPIN)
    assert listed(host) == [model]
    host.management.free_memory(1e30, gpu.device)
    assert gpu.allocated() == 0 and qmove.is_parked(model)


def test_a_pin_of_another_pack_holds_as_ours_does(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    model, adopted = known(16)
    pipeline = Pipeline(model)
    qmove.pin(pipeline)  # nobody has told ComfyUI's list yet
    assert listed(host) == [model]

    with caplog.at_level(logging.WARNING):
        host.management.free_memory(1e30, gpu.device)
        assert places(model) == {"cuda"} and caplog.records == []
        assert pins.choice_of(adopted) == pins.PIN

        host.run({"text": node("Text", text="a")})  # between two nodes the books are put right
        assert listed(host) == []
        qmove.unpin(pipeline)
        host.run({"text": node("Text", text="b")})
        assert listed(host) == [model]

    qmove.pin(pipeline)
    assert pinning.pin_models([adopted], pins.UNPIN).startswith("Unpinned Sequential")
    assert not qmove.is_pinned(pipeline)


class Holder:
    """Allows no look at its tensors but by qmove itself."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = [parameter.data for parameter in model.parameters()]


def test_what_shares_all_its_weights_with_a_pinned_model_stays_and_others_go(
    host: FakeHost, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = known(16)
    holder = Holder(model)
    qmove.pin(holder)
    other, _ = known(17)
    before = gpu.allocated() - sum(parameter.nbytes for parameter in other.parameters())

    with caplog.at_level(logging.WARNING):
        requests.free_vram(64 << 30)
        host.management.free_memory(1e30, gpu.device)

    assert gpu.allocated() == before and places(other) == {"cpu"}
    assert caplog.records == []


@pytest.mark.parametrize("choice", STAYS)
def test_a_stage_parks_around_it_in_every_prompt(host: FakeHost, choice: str) -> None:
    """60 MiB of 128 are pinned: the stages have the rest, in turn."""
    model, _ = known(60, choice)
    for seed in (0, 10, 20):
        host.run(stages(3, 40, seed=seed))
        assert host.errors == []
        assert places(model) == {"cuda"}
    assert sum(qmove.is_parked(model_in(host, f"load{i}")) for i in (1, 2, 3)) == 2


def test_the_node_pins_what_comes_and_gives_it_on(host: FakeHost) -> None:
    prompt = {
        "load": node("Load", mib=60, shape="pipeline"),
        "pin": node("QMovePin", model=("load", 0), choice="pin"),
        "use": node("Use", model=("pin", 0), seed=1),
    }
    outputs = host.run(prompt)

    assert host.errors == []
    model = model_in(host, "load")
    assert qmove.is_pinned(model)
    assert outputs["pin"][1][0].startswith("Pinned Sequential: it stays where it is, ")
    for seed in (2, 3):  # other prompts, in which neither node runs
        work = node("Scratch", mib=40, seed=seed)
        host.run({**prompt, "work": work, "load2": node("Load", mib=50 + seed, shape="plain")})
        assert places(model) == {"cuda"}
    host.run({"load": prompt["load"], "unpin": node("QMovePin", model=("load", 0), choice="unpin")})
    host.run({"load": prompt["load"], "big": node("Scratch", mib=100, seed=4)})
    assert host.errors == [] and qmove.is_parked(model)


def test_the_node_offers_every_gpu(host: FakeHost) -> None:
    (choices, options) = NODE_CLASS_MAPPINGS["QMovePin"].INPUT_TYPES()["required"]["choice"]  # type: ignore[attr-defined]
    assert choices == ["unpin", "pin", "keep on cuda:0", "keep on cuda:1", "forget"]
    assert options["default"] == "pin"


def test_keep_on_another_gpu(host: FakeHost, gpu: GPU, second_gpu: GPU) -> None:
    model, adopted = known(16)

    report = call("QMovePin", model=model, choice="keep on cuda:1")

    assert report.startswith("Pinned Sequential: it is kept on cuda:1. It is ")
    assert (adopted.resident.keys(), gpu.allocated()) == ({second_gpu.device}, 0)
    with pytest.raises(qmove.Pinned):
        qmove.move(model, "cuda:0")


@pytest.mark.parametrize("choice", STAYS)
def test_a_parked_model_comes_home_first(host: FakeHost, choice: str) -> None:
    model, adopted = known(60)
    residency.park([adopted])
    other, _ = known(100)  # a part of it has to leave for it

    pinning.pin_models([adopted], choice)

    assert places(model) == {"cuda"} and places(other) == {"cuda", "cpu"}
    assert pins.choice_of(adopted) == choice
    assert model not in listed(host)


@pytest.mark.parametrize("choice", STAYS)
def test_where_it_finds_no_room_it_is_not_pinned_and_the_browser_hears_why(
    host: FakeHost, choice: str
) -> None:
    model, adopted = known(60)
    residency.park([adopted])
    _blocker = torch.empty(100 * MIB, dtype=torch.uint8, device="cuda:0")

    status, answer = routes._run(routes.read_pin({"models": [adopted.number], "pin": choice}))

    assert status == 409 and "needs" in answer["error"]
    assert pins.choice_of(adopted) == pins.UNPIN and qmove.is_parked(model)


def test_one_choice_takes_the_place_of_the_other(host: FakeHost) -> None:
    model, adopted = known(16)
    for choice in (*STAYS, *reversed(STAYS), pins.FORGET, pins.PIN):
        pinning.pin_models([adopted], choice)
        assert pins.choice_of(adopted) == choice
        assert qmove.is_pinned(model) == (choice != pins.FORGET)
    assert pinning.pin_models([adopted], pins.UNPIN).startswith("Unpinned Sequential")
    assert pinning.pin_models([adopted], pins.UNPIN) == "Sequential was not pinned."


def test_a_model_that_is_left_alone_stays_so_wherever_it_turns_up(host: FakeHost) -> None:
    load = node("Load", mib=60, shape="plain")
    host.run({"load": load})
    model = model_in(host, "load")
    pinning.pin_value(model, pins.FORGET)

    host.run({"load": load, "use": node("Use", model=("load", 0), seed=1)})
    whole = nn.Sequential(model)
    (adopted,) = residency.take_in([whole])
    host.run({"load": load, "work": node("Scratch", mib=100, seed=1)})  # and fails

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert adopted_of(model) is adopted and adopted.left_alone
    assert places(model) == {"cuda"} and listed(host) == []
    assert finding.left_alone() == [] and holders.others_on(torch.device("cuda:0")) == []
    with_qmove = qmove.park(model)  # a pack may still move its own model
    assert with_qmove.nbytes > 0


def test_what_is_parked_and_left_alone_is_not_brought_home_but_wakes(host: FakeHost) -> None:
    load = node("Load", mib=16, shape="plain")
    host.run({"load": load})
    model = model_in(host, "load")
    pinning.pin_value(model, pins.FORGET)
    qmove.park(model)

    host.run({"load": load, "text": node("Text", text=("load", 0))})
    assert qmove.is_parked(model)
    assert requests.restore_all().startswith("Sequential is left alone")
    host.run({"load": load, "use": node("Use", model=("load", 0), seed=1)})
    assert places(model) == {"cuda"} and listed(host) == []


@pytest.mark.parametrize("choice", STAYS)
def test_an_out_of_memory_names_who_is_pinned(
    host: FakeHost, caplog: pytest.LogCaptureFixture, choice: str
) -> None:
    _model, _ = known(80, choice)

    host.run({"work": node("Scratch", mib=60, seed=1)})

    assert host.ran == ["work"]  # there was nothing to park for a second try
    words = {"pin": "pinned", "cuda:0": "kept on cuda:0", "forget": "left alone, as you asked"}
    assert f"Sequential, {words[choice]}. To free it: unpin it (Pin Model" in caplog.text


def test_the_second_try_parks_what_is_idle_and_names_who_is_pinned(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = known(60, pins.PIN)
    idle, _ = known(30)

    host.run({"work": node("Scratch", mib=60, seed=1)})

    assert host.ran == ["work", "work"] and host.errors == []
    assert places(model) == {"cuda"} and places(idle) == {"cpu"}
    assert "cuda:0: Sequential (59.97 MiB) stays, it is pinned. To free it: unpin" in caplog.text


def test_free_vram_says_what_stands_in_the_way(host: FakeHost) -> None:
    _model, _ = known(60, pins.PIN)
    report = call("QMoveFreeVRAM", gib=0.1)
    assert "no model is left to park.\n  cuda:0: Sequential (59.97 MiB) stays, it is pin" in report


def test_the_route_the_state_and_the_report_and_a_page_that_is_loaded_again(host: FakeHost) -> None:
    _model, adopted = known(16)
    events.send_if_changed()
    host.server.sent.clear()

    status, answer = routes._run(routes.read_pin({"models": [adopted.number], "pin": "pin"}))

    assert status == 200 and answer["report"].startswith("Pinned Sequential")
    for snapshot in (host.server.sent[-1][1], state.snapshot()):  # an event; what a new page asks
        assert [model["pin"] for model in snapshot["models"]] == ["pin"]
        assert snapshot["pins"] == ["unpin", "pin", "cuda:0", "cuda:1", "forget"]
    assert "Sequential (pinned): " in report_of_memory().splitlines()[1]
    routes._run(routes.read_pin({"models": [adopted.number], "pin": "unpin"}))
    host.server.sent.clear()
    routes._run(routes.read_pin({"models": [adopted.number], "pin": "forget"}))
    assert [event for event, _ in host.server.sent] == [browser.STATE]
    assert state.snapshot()["models"][0]["pin"] == "forget"
    assert "Sequential (left alone): " in report_of_memory().splitlines()[1]


def test_by_node(host: FakeHost) -> None:
    host.run({"load": node("Load", mib=16, shape="dict")})

    body = {"node": "load", "class": "Load"}
    assert "Pinned" in routes.read_pin({**body, "pin": "pin"})()
    assert qmove.is_pinned(model_in(host, "load"))
    assert "stays as it is" in routes.read_park(body)()
    assert "Unpinned" in routes.read_pin({**body, "pin": "unpin"})()


@pytest.mark.parametrize("choice", STAYS)
def test_a_model_that_dies_is_forgotten(host: FakeHost, choice: str) -> None:
    model, adopted = known(16, choice)
    dead = weakref.ref(model), weakref.ref(adopted)
    del model, adopted
    gc.collect()

    assert [reference() for reference in dead] == [None, None]
    assert adopted_models() == []
    again, new = known(16)
    assert pins.choice_of(new) == pins.UNPIN and not qmove.is_pinned(again)


def test_tensors_without_a_module_can_be_pinned(host: FakeHost) -> None:
    cache = {"keys": torch.ones(4 * MIB, device="cuda:0"), "values": [torch.ones(9, device="cuda")]}

    pinning.pin_value(cache, pins.PIN)

    assert "stays as it is" in requests.park_value(cache)
    requests.park_all()
    assert cache["keys"].untyped_storage().device.type == "cuda"
    assert "holds no model" in pinning.pin_value([1, "a"], pins.PIN)


@pytest.mark.parametrize("choice", STAYS)
def test_of_comfyuis_own_models_qmove_keeps_its_hands_and_comfyui_need_not(
    host: FakeHost, gpu: GPU, choice: str
) -> None:
    patcher = ModelPatcher(model_of(60))
    host.management.load_models_gpu([patcher])

    report = call("QMovePin", model=patcher, choice=choice)

    assert report.startswith("Sequential is ComfyUI's own: qmove does not have it unloaded")
    assert "stays as it is" in call("QMovePark", model=patcher)
    call("QMoveFreeVRAM", gib=0.1)
    assert patcher.loaded_size()
    host.run({"work": node("Scratch", mib=100, seed=1)})
    assert host.ran == ["work"]  # and no second try
    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]
    assert not patcher.loaded_size()  # after an out-of-memory ComfyUI unloads all
    host.management.load_models_gpu([patcher])
    call("QMovePin", model=patcher, choice="unpin")
    call("QMoveFreeVRAM", gib=0.1)
    assert not patcher.loaded_size()
