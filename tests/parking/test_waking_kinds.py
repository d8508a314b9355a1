"""Modules of all kinds wake: odd classes, scripted, traced and compiled ones."""

from __future__ import annotations

import abc
import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.places import place_of
from tests.builders.snapshots import snapshot


class Registering(type):
    """A metaclass that keeps a list of its classes, as model registries do."""

    seen: list[str] = []  # noqa: RUF012

    def __init__(cls, name: str, bases: Any, namespace: Any) -> None:
        super().__init__(name, bases, namespace)
        Registering.seen.append(name)


class Registered(nn.Module, metaclass=Registering):
    subclasses: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Registered.subclasses.append(cls)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...


class Concrete(Abstract):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Further(Concrete):
    pass


class Slotted(nn.Module):
    __slots__ = ("table",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 8)
        self.table = torch.ones(8, device="cuda")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.table


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(64, 8)))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "registering metaclass": Registered,
    "abstract base": Concrete,
    "__slots__": Slotted,
    "parametrized": weight_normed,
    "GraphModule": lambda: torch.fx.symbolic_trace(layers(2)),
    "ScriptModule": lambda: torch.jit.script(layers(2)),
    "TracedModule": lambda: torch.jit.trace(layers(2), inputs()),
    "compiled": lambda: torch.compile(layers(2), backend="eager"),
    "compiled in place": lambda: (model := layers(2), model.compile(backend="eager"))[0],
}


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS.keys())
def test_modules_of_all_kinds_wake(gpu: GPU, build: Callable[[], nn.Module]) -> None:
    model = build().cuda()
    x = inputs()
    with torch.no_grad():
        expected, allocated = model(x), gpu.allocated()
    classes = [type(module) for module in model.modules()]

    for use in (lambda: model(x), lambda: model.forward(x)):
        parked = qmove.park(model)
        assert gpu.allocated() == allocated - parked.nbytes
        assert parked.nbytes >= sum(tensor.nbytes for tensor in model.state_dict().values()) > 0
        if build is Slotted:
            assert place_of(model.table) == "cpu"

        with torch.no_grad():
            assert torch.equal(use(), expected)
        assert not qmove.is_parked(model)
        assert [type(module) for module in model.modules()] == classes


def test_no_library_hears_of_the_class_of_a_sleeping_module(gpu: GPU) -> None:
    model = Registered().cuda()
    qmove.park(model)

    assert Registering.seen == ["Registered"]
    assert Registered.subclasses == []


def test_isinstance_of_an_abstract_class_is_not_confused(gpu: GPU) -> None:
    model = Concrete().cuda()
    qmove.park(model)

    assert isinstance(model, Abstract)
    assert issubclass(type(model), Concrete)
    assert not issubclass(Further, type(model))
    assert issubclass(Further, Concrete)


class Final(type):
    """A metaclass that allows its classes no subclass."""

    def mro(cls) -> Any:
        if any(isinstance(base, Final) for base in cls.__bases__):
            raise TypeError(f"{cls.__bases__[-1].__name__} is final")
        return super().mro()


class Unique(nn.Module, metaclass=Final):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table


def test_a_class_that_allows_no_subclass_is_named_in_the_log_and_can_be_restored(
    gpu: GPU, caplog
) -> None:  # type: ignore[no-untyped-def]
    empty = gpu.allocated()
    model = Unique().cuda()
    before = snapshot(model)

    with caplog.at_level(logging.WARNING, "qmove"):
        qmove.park(model)

    [warning] = caplog.records
    assert (
        "Unique will not wake by itself (Unique is final); call qmove.restore"
        in warning.getMessage()
    )
    assert gpu.allocated() == empty
    assert torch.equal(model(inputs()), inputs() + 1)  # its tensors do
    qmove.restore(model)
    assert snapshot(model) == before
    assert torch.equal(model(inputs()), inputs() + 1)


@pytest.mark.usefixtures("compiling")
def test_a_model_wakes_through_what_torch_compile_returned_and_is_not_compiled_again_and_again(
    gpu: GPU,
) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = layers(2).requires_grad_(True)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        expected = compiled(inputs())
        qmove.park(model)
        assert torch.equal(compiled(inputs()), expected)
    assert not qmove.is_parked(model)

    so_far = len(graphs)
    assert so_far > 0
    for _ in range(3):
        qmove.park(model)
        with torch.no_grad():
            assert torch.equal(compiled(inputs()), expected)
        gc.collect()
    assert len(graphs) == so_far


@pytest.mark.usefixtures("compiling")
def test_a_model_that_is_compiled_while_parked_wakes(gpu: GPU) -> None:
    model = layers(2)
    expected = model(inputs())
    qmove.park(model)

    compiled = torch.compile(model, backend="eager")

    assert torch.equal(compiled(inputs()), expected)
    assert not qmove.is_parked(model)


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("kind", ["GraphModule", "parametrized", "compiled", "abstract base"])
def test_a_deep_copy_of_a_parked_module_of_that_kind_is_as_one_of_a_resident_one(
    gpu: GPU, kind: str
) -> None:
    model = KINDS[kind]().cuda()
    with torch.no_grad():
        expected = model(inputs())
    resident = copy.deepcopy(model)
    qmove.park(model)

    copied = copy.deepcopy(model)

    assert [base.__qualname__ for base in type(copied).__mro__] == [
        base.__qualname__ for base in type(resident).__mro__
    ]
    assert qmove.is_parked(model)
    with torch.no_grad():
        assert torch.equal(copied.cuda()(inputs()), expected)
        assert qmove.is_parked(model)
        assert torch.equal(model(inputs()), expected)


def test_a_class_that_is_given_while_parked_stays(gpu: GPU) -> None:
    model = layers(1)
    expected = model(inputs()) * 2
    qmove.park(model)

    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model[0].__class__ = Doubling

    assert torch.equal(model(inputs()), expected)
    assert type(model[0]) is Doubling
