"""Anything that holds tensors can be parked: what is the object's own goes along, what belongs to
others stays."""

from __future__ import annotations

import collections
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory import arena
from tests.builders.device import GPU
from tests.builders.models import layers, tiny_diffusion
from tests.builders.places import place_of, places
from tests.builders.snapshots import snapshot


def inputs() -> torch.Tensor:
    return torch.linspace(-1, 1, 128, device="cuda").reshape(2, 64)


class ModelPatcher:
    """Like the wrapper objects of node packs: the network is three attributes deep, beside things
    that hold no tensor."""

    def __init__(self) -> None:
        self.model = ModelBase()
        self.load_device = torch.device("cuda:0")
        self.options = {"transformer_options": {}, "name": "tiny"}


class ModelBase:
    def __init__(self) -> None:
        self.inner = Loaded()
        self.sampler = functools.partial(max, key=len)


class Loaded:
    def __init__(self) -> None:
        self.network = layers()


class Slotted:
    __slots__ = ("_missing", "network", "table")

    def __init__(self) -> None:
        self.network = layers(2)
        self.table = torch.ones(8, device="cuda")


class SlottedBelow(Slotted):
    __slots__ = ("__hidden", "more")

    def __init__(self) -> None:
        super().__init__()
        self.more = [torch.ones(4, device="cuda")]
        self.__hidden = torch.ones(4, device="cuda")


@dataclass(frozen=True)
class Latents:
    samples: torch.Tensor
    noise: tuple[torch.Tensor, ...]


class Evasive:
    """Answers any attribute, and fails in its property: asking the object must not run its code."""

    def __init__(self) -> None:
        self.network = layers(1)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"asked for {name}")

    @property
    def device(self) -> torch.device:
        raise RuntimeError("asked for the device")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    __hash__ = None  # type: ignore[assignment]


Pair = collections.namedtuple("Pair", "first second")


def closure_over_a_model() -> Callable[[], torch.Tensor]:
    model = layers(1)
    not_yet: torch.Tensor

    def predict() -> torch.Tensor:
        return model(inputs()) + not_yet

    if predict is None:
        not_yet = inputs()
    return predict


def itself_inside() -> dict[str, Any]:
    shelf: dict[str, Any] = {"model": layers(1)}
    shelf["shelf"] = shelf
    return shelf


OBJECTS: dict[
    str, tuple[Callable[[], Any], int]
] = {  # what builds it, and the bytes it has on the device
    "module": (layers, 4 * (64 * 64 + 64) * 4),
    "wrapper object": (ModelPatcher, 4 * (64 * 64 + 64) * 4),
    "dict of modules": (lambda: {"a": layers(1), "b": layers(1)}, 2 * (64 * 64 + 64) * 4),
    "list of modules": (lambda: [layers(1), layers(1)], 2 * (64 * 64 + 64) * 4),
    "tuple, set and deque": (
        lambda: (layers(1), {layers(1)}, collections.deque([layers(1)])),
        3 * (64 * 64 + 64) * 4,
    ),
    "namedtuple": (lambda: Pair(layers(1), None), (64 * 64 + 64) * 4),
    "defaultdict": (lambda: collections.defaultdict(list, {7: [layers(1)]}), (64 * 64 + 64) * 4),
    "dict that holds itself": (itself_inside, (64 * 64 + 64) * 4),
    "dict of tensors": (
        lambda: {"x": torch.ones(64, device="cuda"), "y": [torch.ones(2, device="cuda")]},
        66 * 4,
    ),
    "one tensor": (lambda: torch.ones(64, device="cuda"), 64 * 4),
    "one parameter": (lambda: nn.Parameter(torch.ones(64, device="cuda")), 64 * 4),
    "__slots__": (Slotted, 2 * (64 * 64 + 64) * 4 + 32),
    "inherited __slots__": (SlottedBelow, 2 * (64 * 64 + 64) * 4 + 64),
    "frozen dataclass": (
        lambda: Latents(torch.ones(8, device="cuda"), (torch.ones(4, device="cuda"),)),
        48,
    ),
    "partial": (lambda: functools.partial(layers(1), input=None), (64 * 64 + 64) * 4),
    "bound method": (lambda: layers(1).forward, (64 * 64 + 64) * 4),
    "closure": (closure_over_a_model, (64 * 64 + 64) * 4),
    "object that must not be asked": (Evasive, (64 * 64 + 64) * 4),
}
every_object = pytest.mark.parametrize(("build", "nbytes"), OBJECTS.values(), ids=OBJECTS.keys())


@every_object
def test_an_object_leaves_the_device_and_comes_back_as_it_was(
    gpu: GPU, build: Callable[[], Any], nbytes: int
) -> None:
    empty = gpu.allocated()
    obj = build()
    before = snapshot(obj)
    assert gpu.allocated() == empty + nbytes

    parked = qmove.park(obj)
    assert parked.nbytes == parked.copied_bytes == nbytes
    assert gpu.allocated() == empty
    assert qmove.is_parked(obj)
    assert qmove.park(obj).nbytes == 0

    restored = parked.restore()
    assert restored.nbytes == nbytes
    assert snapshot(obj) == before
    assert not qmove.is_parked(obj)
    assert qmove.stats().arena_bytes == 0


@every_object
def test_an_object_that_was_parked_is_listed_until_it_is_home_or_gone(
    gpu: GPU, build: Callable[[], Any], nbytes: int
) -> None:
    obj = build()
    qmove.park(obj)

    [listed] = qmove.parked_models()
    qmove.restore(listed)
    assert not qmove.is_parked(obj)
    assert qmove.parked_models() == []

    qmove.park(obj)
    del obj, listed
    gc.collect()
    assert qmove.parked_models() == []
    assert arena.bytes_in_use() == 0


def test_a_model_in_a_dict_wakes_alone(gpu: GPU) -> None:
    shelf = {"a": layers(1), "b": {"c": [layers(1)]}}
    expected = shelf["a"](inputs())
    qmove.park(shelf)

    assert torch.equal(shelf["a"](inputs()), expected)

    assert places(shelf["a"]) == {"cuda"} and places(shelf["b"]["c"][0]) == {"cpu"}
    assert torch.equal(shelf["b"]["c"][0](inputs()), expected)
    assert not qmove.is_parked(shelf)


def test_a_model_in_a_closure_wakes(gpu: GPU) -> None:
    model = layers(1)

    def predict() -> torch.Tensor:
        return model(inputs())

    expected = predict()
    qmove.park(predict)
    assert place_of(model[0].weight) == "cpu"

    assert torch.equal(predict(), expected)


def test_a_model_that_never_was_on_a_device_is_not_parked(gpu: GPU) -> None:
    model = layers(device="cpu")

    assert qmove.park(model).nbytes == 0

    assert not qmove.is_parked(model)
    assert type(model[0]) is nn.Linear
    assert qmove.parked_models() == []


# Whose a module is --------------------------------------------------------------------------------


def test_a_back_reference_to_a_parent_does_not_take_the_parent_along(gpu: GPU) -> None:
    parent = layers(3)
    child = parent[1]
    object.__setattr__(child, "parent", parent)
    child.parents = [parent]

    parked = qmove.park(child)

    assert parked.nbytes == (64 * 64 + 64) * 4
    assert parent[0].weight.device == gpu.device
    assert qmove.inventory(child).foreign
    assert type(parent[0]) is nn.Linear


def test_a_module_hidden_from_registration_on_purpose_stays(gpu: GPU) -> None:
    shared, model = layers(1), layers(1)
    object.__setattr__(model[0], "teacher", shared)

    qmove.park(model)

    assert shared[0].weight.device == gpu.device
    assert qmove.inventory(model).foreign == ["0.teacher"]


def test_layers_in_a_plain_list_are_the_models_own(gpu: GPU) -> None:
    model = layers(1)
    model.blocks = [layers(1)]
    model.by_name = {"head": (layers(1),)}

    qmove.park(model)

    assert place_of(model.blocks[0][0].weight) == "cpu"
    assert place_of(model.by_name["head"][0][0].weight) == "cpu"
    model.blocks[0](inputs())
    assert model[0].weight.device == gpu.device


def test_models_that_a_hook_refers_to_stay(gpu: GPU) -> None:
    """diffusers' ComponentsManager gives each model a hook that knows all the others."""
    from diffusers import ComponentsManager

    manager = ComponentsManager()
    first, second = tiny_diffusion("cpu").unet, tiny_diffusion("cpu").unet
    manager.add("first", first)
    manager.add("second", second)
    manager.enable_auto_cpu_offload(device="cuda:0")
    sample = torch.ones(1, 3, 8, 8, device="cuda")
    with torch.no_grad():
        expected = first(sample, 1).sample
        second(sample, 1)
    assert first.device == second.device == gpu.device
    before = snapshot(second)

    qmove.park(first)

    assert snapshot(second) == before
    assert not qmove.is_parked(second)
    assert places(first) == {"cpu"}
    with torch.no_grad():
        assert torch.equal(first(sample, 1).sample, expected)


# Nothing to park ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nothing",
    [None, 3, "model", {}, [], object(), nn.ReLU(), lambda: 1, int, torch.nn],
    ids=lambda thing: type(thing).__name__,
)
def test_an_object_without_tensors_is_refused(nothing: object) -> None:
    for act in (qmove.park, qmove.restore, lambda obj: qmove.move(obj, "cpu")):
        with pytest.raises(
            qmove.NoTensors,
            match=rf"{type(nothing).__name__} holds no tensor .*Pass the model itself",
        ):
            act(nothing)


def test_an_object_that_only_refers_to_somebody_elses_model_is_told_so(gpu: GPU) -> None:
    adapter = nn.Module()
    object.__setattr__(adapter, "base_model", layers())

    with pytest.raises(
        qmove.NoTensors, match="modules that are not its own: base_model; pass those"
    ):
        qmove.park(adapter)


# What goes along ----------------------------------------------------------------------------------


class Cache:
    """Keys and values, like a KV cache."""

    def __init__(self) -> None:
        self.keys = [torch.arange(64.0, device="cuda")]
        self.values = [torch.arange(64.0, device="cuda") * 2]


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: {"model": model}, lambda model: [model]]
)
@pytest.mark.parametrize("how", ["restored", "woken"])
def test_an_optimizer_and_a_cache_leave_and_come_home_with_the_model(
    gpu: GPU, wrap: Callable[[Any], Any], how: str
) -> None:
    empty = gpu.allocated()
    model = layers(1).requires_grad_(True)
    optimizer, cache = torch.optim.Adam(model.parameters()), Cache()
    model(inputs()).sum().backward()
    optimizer.step()
    root = wrap(model)
    before, optimizer_before, cache_before = snapshot(model), snapshot(optimizer), snapshot(cache)

    qmove.park(root, extra=[optimizer, {"cache": cache}])
    assert gpu.allocated() == empty
    assert place_of(cache.keys[0]) == "cpu"

    if how == "restored":
        qmove.restore(root)
    else:
        with torch.no_grad():
            model(inputs())
    assert snapshot(model) == before
    assert snapshot(optimizer) == optimizer_before
    assert snapshot(cache) == cache_before
    optimizer.step()  # moments, parameters and gradients meet on one device


def test_an_extra_that_is_gone_does_not_matter(gpu: GPU) -> None:
    model, cache = layers(1), Cache()
    expected = model(inputs())
    qmove.park(model, extra=[cache])
    with_cache = arena.bytes_in_use()

    del cache
    gc.collect()

    assert arena.bytes_in_use() <= with_cache
    assert torch.equal(model(inputs()), expected)


def test_what_comes_to_a_container_while_it_is_parked_stays_where_it_is(gpu: GPU) -> None:
    shelf: dict[str, Any] = {"a": layers(1)}
    qmove.park(shelf)
    shelf["b"] = layers(1, device="cpu")

    qmove.restore(shelf)

    assert shelf["a"][0].weight.device == gpu.device
    assert place_of(shelf["b"][0].weight) == "cpu"
