"""Models that no wire carries: one node for each hiding place, beside a loader that needs the room."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.models import finding
from qmove_pack.nodes.host.models.adopted import adopted_models
from qmove_pack.nodes.host.stages import requests
from torch import nn

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_of, node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated  # the stories are about a GPU that is too small

MIB_IN_ALL, HIDDEN_MIB, LOADED_MIB = 48, 16, 36
pack: Any = None  # the module of a pack, imported for each test: it keeps what its nodes hide


class _Hiding:
    """Computes with its model, which only it knows, and gives a number."""

    FUNCTION = "run"
    INPUTS: ClassVar[dict[str, Any]] = {"seed": ("INT", {}), "after": ("*", {})}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.INPUTS}

    def run(self, seed: int, after: Any = None) -> tuple[Any]:
        return (compute(self.model(), seed),)

    def model(self) -> Any:
        raise NotImplementedError


def compute(model: Any, seed: int) -> float:
    if isinstance(model, dict):
        return sum((tensor * (seed + 1)).sum().item() for tensor in model["features"])
    width = model[0].in_features
    with torch.no_grad():
        return model(torch.full((1, width), float(seed + 1), device="cuda:0")).sum().item()


def load() -> nn.Module:
    torch.manual_seed(0)
    return model_of(HIDDEN_MIB)


def features() -> dict[str, Any]:
    return {"features": [torch.full((4 * MIB // 4,), 1.0 + i, device="cuda:0") for i in range(4)]}


class OnInstance(_Hiding):
    kept = None

    def model(self) -> Any:
        self.kept = self.kept or load()
        return self.kept


def on_class() -> type:
    class OnClass(_Hiding):
        kept: Any = None

        def model(self) -> Any:
            OnClass.kept = OnClass.kept or load()
            return OnClass.kept

    return OnClass


class InGlobal(_Hiding):
    def model(self) -> Any:
        pack.sessions = pack.sessions or {"a": {"net": load()}}
        return pack.sessions["a"]["net"]


class InClosure(_Hiding):
    def model(self) -> Any:
        if pack.kept is None:
            net = load()
            pack.kept = lambda: net
        return pack.kept()


class InLruCache(_Hiding):
    def model(self) -> Any:
        pack.kept = pack.kept or functools.lru_cache(load)
        return pack.kept()


class InPartial(_Hiding):
    def model(self) -> Any:
        pack.kept = pack.kept or functools.partial(compute, load())
        return pack.kept.args[0]


class InThreadLocal(_Hiding):
    def model(self) -> Any:
        pack.kept = pack.kept or threading.local()
        pack.kept.net = getattr(pack.kept, "net", None) or load()
        return pack.kept.net


class FeaturesOnInstance(_Hiding):
    """No module: a video's state in a dict."""

    state = None

    def model(self) -> Any:
        self.state = self.state or features()
        return self.state


class FeaturesInGlobal(_Hiding):
    def model(self) -> Any:
        pack.sessions = pack.sessions or features()
        return pack.sessions


class FeaturesOfAModuleThatLeft(_Hiding):
    """Its owner has moved the weights off by itself, and kept what it computed."""

    net = None

    def model(self) -> Any:
        if self.net is None:
            self.net = load()
            self.net.cache = features()
            self.net.to("cpu")
        return self.net.cache


HIDING = (
    *(OnInstance, InGlobal, InClosure, InLruCache, InPartial, InThreadLocal),
    *(FeaturesOnInstance, FeaturesInGlobal, FeaturesOfAModuleThatLeft),
)
NAMES = ("OnClass", *(cls.__name__ for cls in HIDING))
NAMED = {
    "OnInstance": "OnInstance node, `self.kept`",
    "OnClass": "OnClass node, `on_class.<locals>.OnClass.kept`",
    "InGlobal": "module careless, `sessions['a']['net']`",
    "InLruCache": f"lru_cache of {__name__}.load",
    "FeaturesOnInstance": "FeaturesOnInstance node, `self.state['features']",
}


@pytest.fixture(autouse=True)
def _small_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    global pack
    pack = ModuleType("careless")
    exec("sessions = kept = None", vars(pack))
    careless_nodes.forget_all()
    finding.forget_all()
    simcuda.set_memory(MIB_IN_ALL * MIB)
    host = request.getfixturevalue("host")
    host.add(*careless_nodes.ALL, *HIDING, on_class())
    yield
    pack = None
    finding.forget_all()


def both(name: str, seed: int, load_seed: int = 0) -> dict[str, Any]:
    return {
        "hide": node(name, seed=seed),
        "load": node("Load", mib=LOADED_MIB + load_seed, shape="plain", after=("hide", 0)),
        "use": node("Use", model=("load", 0), seed=load_seed),
    }


@pytest.mark.parametrize("name", NAMES)
def test_without_qmove_the_loader_runs_out_of_memory(host: FakeHost, name: str) -> None:
    settings.change({settings.AUTO_PARK: False})

    host.run(both(name, 0))

    assert [type(error) for error in host.errors] == [torch.OutOfMemoryError]


@pytest.mark.parametrize("name", NAMES)
def test_a_hidden_model_goes_and_comes_back(host: FakeHost, gpu: GPU, name: str) -> None:
    alone = [host.run({"hide": node(name, seed=seed)})["hide"] for seed in range(3)]
    for seed in (4, 5):
        host.run(both(name, seed))
        assert host.errors == []
    for seed in range(3):  # two workflows in turn
        assert host.run({"hide": node(name, seed=seed)})["hide"] == alone[seed]
        assert host.errors == []
        host.run(
            {
                "load": node("Load", mib=LOADED_MIB, shape="plain"),
                "use": node("Use", model=("load", 0), seed=10 + seed),
            }
        )
        assert host.errors == []


@pytest.mark.parametrize("name", list(NAMED))
def test_it_is_named_after_where_it_lives(host: FakeHost, name: str) -> None:
    host.run({"hide": node(name, seed=0)})

    (adopted,) = adopted_models()
    assert (adopted.place or adopted.name).startswith(NAMED[name].rstrip("`"))
    assert sum(adopted.resident.values()) == torch.cuda.memory_allocated()
    assert [line.model.model for line in host.management.current_loaded_models] == [adopted.model]


def test_comfyui_evicts_it(host: FakeHost, gpu: GPU) -> None:
    host.run({"hide": node("OnInstance", seed=0)})

    host.management.free_memory(1e30, gpu.device)

    assert torch.cuda.memory_allocated() == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_is_not_kept_alive(host: FakeHost, name: str) -> None:
    global pack
    host.run({"hide": node(name, seed=0)})
    assert adopted_models()

    pack = None
    host.instances.clear()
    host.classes.clear()
    careless_nodes.forget_all()

    assert torch.cuda.memory_allocated() == 0
    assert adopted_models() == []


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    looked: list[Any] = []
    original = finding._look_through
    monkeypatch.setattr(finding, "_look_through", lambda: looked.append(1) or original())
    return looked


def test_where_all_is_explained_nothing_is_looked_through(host: FakeHost, looks: list[Any]) -> None:
    prompt = careless_nodes.stages(2, 12)
    for seed in range(3):
        prompt["use2"]["inputs"]["seed"] = seed
        host.run(prompt)
    host.run({"s": node("Scratch", mib=20, seed=3)})

    assert looks == []


def test_what_cannot_be_explained_is_looked_for_once(host: FakeHost, looks: list[Any]) -> None:
    class InC(_Hiding):
        """Its tensor is held by autograd only."""

        def run(self, seed: int, after: Any = None) -> tuple[Any]:
            if pack.kept is None:
                with torch.inference_mode(False), torch.enable_grad():
                    weight = torch.ones(1, device="cuda:0", requires_grad=True)
                    pack.kept = (weight * torch.ones(2 * MIB, device="cuda:0")).sum()
            return (seed,)

    host.add(InC)
    for seed in range(4):
        host.run({"c": node("InC", seed=seed), "s": node("Scratch", mib=8, seed=seed)})

    assert len(looks) == 1
    assert [(a.name, a.place) for a in adopted_models()] == []


@pytest.mark.parametrize("kind", ["dict", "list", "tensor"])
def test_the_park_node_takes_tensors_without_a_module(host: FakeHost, gpu: GPU, kind: str) -> None:
    cache = {
        "k": torch.ones(MIB // 4, device=gpu.device),
        "more": [torch.ones(9, device=gpu.device)],
    }
    value = {"dict": cache, "list": [cache], "tensor": cache["k"]}[kind]

    assert "left cuda:0" in requests.park_value(value)
    assert qmove.inventory(value).by_device == {"cpu": qmove.inventory(value).nbytes}

    requests.restore_value(value)
    assert qmove.inventory(value).by_device == {"cuda:0": qmove.inventory(value).nbytes}
    assert bool((cache["k"] == 1).all())


def test_state_on_a_wire_is_parked_for_others_and_home_before_its_node(host: FakeHost) -> None:
    class Track(_Hiding):
        RETURN_TYPES = ("VIDEO_STATE", "STRING")

        def run(self, seed: int, after: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
            return features(), "tracked"

    class Read(_Hiding):
        INPUTS: ClassVar[dict[str, Any]] = {"state": ("*", {}), "after": ("*", {})}

        def run(self, state: Any, after: Any = None) -> tuple[Any]:  # type: ignore[override]
            return (
                str(state["features"][0].device),
                [t.cpu().mean().item() for t in state["features"]],
            )

    Read.RETURN_TYPES = ("STRING", "LIST")  # type: ignore[attr-defined]
    host.add(Track, Read)
    load = node("Load", mib=LOADED_MIB, shape="plain", after=("track", 1))
    use = node("Use", model=("load", 0), seed=1)
    read = node("Read", state=("track", 0), after=("use", 0))

    outputs = host.run({"track": node("Track", seed=0), "load": load, "use": use, "read": read})

    assert host.errors == []
    assert [value[0] for value in outputs["read"]] == ["cuda:0", [1.0, 2.0, 3.0, 4.0]]


def test_images_on_wires_are_no_models(host: FakeHost, looks: list[Any]) -> None:
    class Draw(_Hiding):
        RETURN_TYPES = ("IMAGE", "LATENT")

        def run(self, seed: int, after: Any = None) -> tuple[Any, Any]:  # type: ignore[override]
            image = torch.zeros(2 * MIB, device="cuda:0")
            return image, {"samples": torch.zeros(2 * MIB, device="cuda:0")}

    host.add(Draw)
    host.run({"draw": node("Draw", seed=0)})

    assert (adopted_models(), looks) == ([], [])
    assert sum(finding.on_wires().values()) == 16 * MIB


def offloaded_by_accelerate(model: nn.Module) -> None:
    model[0]._hf_hook = type("AlignDevicesHook", (), {"offload": True})()  # type: ignore[index]


def swapped_in_blocks(model: nn.Module) -> None:
    model.blocks_to_swap = 2  # type: ignore[assignment]


def managed_by_mmgp(model: nn.Module) -> None:
    model[0]._mm_manager = object()  # type: ignore[index]


@pytest.mark.parametrize("manage", [offloaded_by_accelerate, swapped_in_blocks, managed_by_mmgp])
def test_what_another_manager_moves_is_left_alone_and_said(
    host: FakeHost, looks: list[Any], manage: Any
) -> None:
    class Managed(_Hiding):
        def model(self) -> Any:
            if pack.kept is None:
                pack.kept = load()
                manage(pack.kept)
            return pack.kept

    host.add(Managed)
    for seed in range(3):
        host.run({"hide": node("Managed", seed=seed)})

    assert adopted_models() == []
    (left,) = finding.left_alone()
    assert left.name == "Sequential"
    assert left.reason.startswith("moved by")
    assert sum(left.resident.values()) == torch.cuda.memory_allocated()
    assert len(looks) == 1
