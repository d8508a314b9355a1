"""`inventory`: every tensor a model holds, found by walking objects, grouped by storage."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import qmove_core as qmove
from qmove_core.model import walk
from tests.builders.device import GPU
from tests.builders.models import layers


def names(model: object, **options: Any) -> set[str]:
    return {
        name for holding in qmove.inventory(model, **options).holdings for name in holding.names
    }


def tensor() -> torch.Tensor:
    return torch.ones(3, device="cuda")


@dataclass
class QuantState:
    scale: torch.Tensor


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def closure_over(value: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output + value

    return hook


def hidden_in_a_cache(value: torch.Tensor) -> Any:
    @functools.lru_cache
    def table() -> torch.Tensor:
        return value

    table()
    return table


PLACES: dict[str, Any] = {
    "a plain attribute": lambda t: t,
    "a list": lambda t: [t],
    "a dict": lambda t: {"key": t},
    "nested containers": lambda t: {"a": [({"b": (t,)},)]},
    "a set": lambda t: {t},
    "a deque": lambda t: deque([t]),
    "a dataclass": QuantState,
    "slots": Slotted,
    "a partial": lambda t: functools.partial(print, t),
    "a partial's keyword": lambda t: functools.partial(print, end=t),
    "a closure": closure_over,
    "a function's default": lambda t: lambda value=t: value,
    "a bound method": lambda t: QuantState(t).__eq__,
    "an lru_cache": hidden_in_a_cache,
    "a dict's key": lambda t: {t: 1},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_found_in(gpu: GPU, place: str) -> None:
    model = layers(1)
    hidden = tensor()
    model[0].hidden = PLACES[place](hidden)

    found = [t for holding in qmove.inventory(model).holdings for t in holding.tensors]

    assert any(t is hidden for t in found)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_a_tensor_is_found_in_the_closure_of_a_hook(gpu: GPU, register: str) -> None:
    model, hidden = layers(1), tensor()
    getattr(model[0], register)(closure_over(hidden))

    assert any(t is hidden for holding in qmove.inventory(model).holdings for t in holding.tensors)


def test_parameters_buffers_gradients_and_bases_are_told_apart(gpu: GPU) -> None:
    model = nn.BatchNorm1d(4, device="cuda")
    model.weight.grad = torch.ones(4, device="cuda")
    model.view = torch.ones(4, 4, device="cuda")[1]

    kinds = {holding.name: holding.kind for holding in qmove.inventory(model).holdings}

    assert kinds == {
        "weight": "parameter",
        "bias": "parameter",
        "running_mean": "buffer",
        "running_var": "buffer",
        "num_batches_tracked": "buffer",
        "weight.grad": "gradient",
        "view": "state",
    }
    assert "view._base" in names(model)


def test_tied_weights_and_views_are_one_holding_counted_once(gpu: GPU) -> None:
    model = layers(2)
    model[1].weight = model[0].weight
    model.row = model[0].weight.data[3]

    inventory = qmove.inventory(model)

    [shared] = [holding for holding in inventory.holdings if "0.weight" in holding.names]
    assert {"0.weight", "1.weight", "row"} <= set(shared.names)
    assert shared.nbytes == model[0].weight.nbytes
    assert inventory.nbytes == model[0].weight.nbytes + 2 * model[0].bias.nbytes


def test_a_kv_cache_is_found(gpu: GPU) -> None:
    from transformers import DynamicCache

    model, cache = layers(1), DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4, device="cuda"), torch.ones(1, 2, 3, 4, device="cuda"), 0)

    assert (
        qmove.inventory(model, extra=[cache]).nbytes == qmove.inventory(model).nbytes + 2 * 24 * 4
    )
    model.past = cache
    assert {"past.layers[0].keys", "past.layers[0].values"} <= names(model)


def test_it_stops_at_modules_that_are_not_the_models_own(gpu: GPU) -> None:
    model, other = layers(1), layers(1)

    class Manager:
        def __init__(self) -> None:
            self.models = {"other": other}

    model.manager = Manager()
    model[0].register_forward_hook(lambda module, args, output: other(output) and None)
    object.__setattr__(model, "teacher", other)

    inventory = qmove.inventory(model)

    assert {holding.name for holding in inventory.holdings} == {"0.weight", "0.bias"}
    assert "manager.models.other" in inventory.foreign
    assert "teacher" in inventory.foreign
    assert "left alone: teacher" in str(inventory)


def test_it_stops_at_a_back_reference_to_the_parent(gpu: GPU) -> None:
    parent = nn.Sequential(layers(1), layers(1))
    parent[0].parents = [parent]

    assert names(parent[0]) == {"0.weight", "0.bias"}
    assert names(parent) == {"0.0.weight", "0.0.bias", "1.0.weight", "1.0.bias"}


def test_layers_in_a_plain_list_are_the_models_own(gpu: GPU) -> None:
    model = nn.Module()
    model.blocks = [layers(1), layers(1)]

    assert names(model) == {f"blocks[{i}].0.{name}" for i in (0, 1) for name in ("weight", "bias")}


def test_it_stops_at_modules_of_code_and_classes(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layers(1)
    monkeypatch.setattr(walk, "planted", tensor(), raising=False)
    monkeypatch.setattr(QuantState, "planted", tensor(), raising=False)
    model.code, model.cls = sys.modules[walk.__name__], QuantState

    assert names(model) == {"0.weight", "0.bias"}


class UnsetSlot:
    """Its `__getattr__` is asked for the slot, and works only once the object is connected."""

    __slots__ = ("connection",)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not connected")


class ModuleWithUnsetSlot(nn.Module):
    __slots__ = ("connection",)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("not connected")


class UnboundProxy:
    @property
    def __class__(self) -> type:  # type: ignore[override]
        raise RuntimeError("working outside of a request")


class Locked:
    def __getattribute__(self, name: str) -> Any:
        raise PermissionError(name)


@pytest.mark.parametrize("odd", [UnsetSlot, ModuleWithUnsetSlot, UnboundProxy, Locked])
def test_an_object_that_raises_when_it_is_read_holds_nothing(gpu: GPU, odd: type) -> None:
    model = layers(1)
    found = names(model)
    model[0].__dict__["odd"] = odd()
    model[0].several = [odd()]

    assert names(model) == found
    assert names({"odd": odd(), "model": model}) == {f"model.{name}" for name in found}


def test_meta_tensors_are_listed_apart(gpu: GPU) -> None:
    model = nn.Sequential(layers(1), nn.Linear(8, 4, device="meta"))

    inventory = qmove.inventory(model)

    assert [(meta.name, meta.shape, meta.nbytes) for meta in inventory.meta] == [
        ("1.weight", (4, 8), 128),
        ("1.bias", (4,), 16),
    ]
    assert "meta" not in inventory.by_device


def test_bytes_by_device(gpu: GPU) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False, device="cuda"), nn.Linear(8, 8, bias=False))

    inventory = qmove.inventory(model)

    assert inventory.by_device == {"cuda:0": 256, "cpu": 256}
    assert inventory.nbytes == 512


def test_the_table_can_be_read(gpu: GPU) -> None:
    text = str(qmove.inventory(layers(3)))

    assert "48.75 KiB in 6 storages" in text
    [line] = [line for line in text.splitlines() if "parameter" in line]
    for cell in ("cuda:0", "float32", "6", "48.75 KiB", "0.weight"):
        assert cell in line


def test_to_dict_is_plain_data(gpu: GPU) -> None:
    data = qmove.inventory(layers(1)).to_dict()

    assert json.loads(json.dumps(data)) == data
    assert data["by_device"] == {"cuda:0": 64 * 64 * 4 + 64 * 4}
    assert data["holdings"][0] == {
        "names": ["0.weight"],
        "kind": "parameter",
        "dtype": "float32",
        "device": "cuda:0",
        "nbytes": 16384,
    }


def test_taking_it_copies_nothing_and_allocates_nothing(gpu: GPU) -> None:
    import simcuda

    if not simcuda.is_active():
        pytest.skip("counts of copies are the simulator's")
    model = layers(3)
    before = simcuda.counters()

    str(qmove.inventory(model))

    assert simcuda.counters() == before


def test_ten_thousand_tensors_are_all_found(gpu: GPU) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2, device="cuda") for _ in range(5000)])

    inventory = qmove.inventory(model)

    assert len(inventory.holdings) == 10_000
    assert inventory.nbytes == 5000 * (16 + 8)


def test_it_holds_back_the_garbage_collector_and_leaves_the_collector_as_it_was(gpu: GPU) -> None:
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(1000)])
    started: list[int] = []
    gc.callbacks.append(
        note := lambda phase, info: started.append(info["generation"]) if phase == "start" else None
    )
    try:
        gc.collect()
        started.clear()
        inventory = qmove.inventory(model)
        after = len(started)
        assert gc.isenabled()
        gc.disable()
        qmove.inventory(model)
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.callbacks.remove(note)

    assert after <= 1  # the one that was due is made up for
    assert len(inventory.holdings) == 2000


class AsksNothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"inventory called {func}")


def fake_tensor_mode() -> Any:
    from torch._subclasses import FakeTensorMode

    return FakeTensorMode()


STATES: dict[str, Callable[[], Any]] = {
    "a function mode": AsksNothing,
    "a default device": lambda: torch.device("meta"),
    "fake tensors": fake_tensor_mode,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
}


@pytest.mark.parametrize("state", STATES)
def test_it_is_the_same_whatever_is_switched_on_around_it(gpu: GPU, state: str) -> None:
    model = layers(2)
    model.view = model[0].weight.T
    expected = qmove.inventory(model).to_dict()

    with STATES[state]():
        found = qmove.inventory(model).to_dict()

    assert found == expected
