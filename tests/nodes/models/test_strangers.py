"""What other packs put into ComfyUI's list of loaded models is left to ComfyUI; ours go on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.panel import state

import qmove_core as qmove
import simcuda
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_of, node, stages
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher

pytestmark = pytest.mark.simulated
DEVICE = torch.device("cuda:0")


class Raises:
    """Raises from `__getattr__`, and no AttributeError."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


class Forwards:
    """Gives out whatever another object has."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


class Fails(ModelPatcher):
    """One of ComfyUI's kind whose process behind it is gone."""

    def loaded_size(self) -> int:
        raise ConnectionError("the worker has gone away")


class SaysItIsAnother(ModelPatcher):
    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("ask me nothing")


def line(entry: Any) -> Any:
    """A line of the list, as a pack makes one of its own."""
    return SimpleNamespace(
        model=entry,
        device=DEVICE,
        currently_used=False,
        model_finalizer=None,
        is_dead=lambda: False,
    )


def line_of_a_dead_entry() -> Any:
    return line(None)


class VanishingLine:
    """Its entry is there when it is asked for first, and gone from then on."""

    device, model_finalizer, currently_used = DEVICE, None, False

    def __init__(self) -> None:
        self._entry: Any = ModelPatcher(model_of(4, "cpu"))

    @property
    def model(self) -> Any:
        entry, self._entry = self._entry, None
        return entry

    def is_dead(self) -> bool:
        return False


STRANGERS: dict[str, Callable[[], Any]] = {
    "lacks all attributes": lambda: line(object()),
    "lacks sizes": lambda: line(SimpleNamespace(model=None, load_device=DEVICE)),
    "raises from __getattr__": lambda: line(Raises()),
    "is a line that raises": Raises,
    "is a line without a model": lambda: SimpleNamespace(device=DEVICE),
    "forwards to a module": lambda: line(Forwards(model_of(4, "cpu"))),
    "forwards to a patcher": lambda: line(Forwards(ModelPatcher(model_of(4, "cpu")))),
    "answers everything": lambda: line(MagicMock()),
    "fails when asked": lambda: line(Fails(model_of(4, "cpu"))),
    "raises from __class__": lambda: line(SaysItIsAnother(model_of(4, "cpu"))),
    "is dead": line_of_a_dead_entry,
    "vanishes": VanishingLine,
}


@pytest.fixture(params=STRANGERS)
def stranger(request: pytest.FixtureRequest, host: FakeHost, monkeypatch: Any) -> Any:
    monkeypatch.setattr(residency, "_left", set())
    careless_nodes.forget_all()
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL)
    made = STRANGERS[request.param]()
    host.management.current_loaded_models.append(made)
    yield made
    host.management.current_loaded_models.clear()
    gc.collect()


def test_three_models_of_60_percent_still_run_in_turn(
    host: FakeHost, stranger: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "qmove"):
        for seed in (0, 10):
            host.run(stages(3, 76, seed=seed))
            assert host.errors == []

    assert stranger in host.management.current_loaded_models
    assert sum("is left to ComfyUI" in record.getMessage() for record in caplog.records) <= 1


def test_a_model_that_wakes_in_a_node_finds_room(host: FakeHost, stranger: Any) -> None:
    """It asks ComfyUI, which may fail at the stranger; then ours go all the same."""
    hidden = model_of(80)
    residency.park(residency.take_in([hidden]))
    idle = model_of(60)
    residency.take_in([idle])

    class Hidden(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            hidden(torch.zeros(1, hidden[0].in_features, device=DEVICE))
            return (1,)

    host.add(Hidden)
    host.run({"hidden": node("Hidden")})

    assert host.errors == []
    assert qmove.is_parked(idle)


def test_the_panel_shows_ours(host: FakeHost, stranger: Any) -> None:
    model = model_of(10)
    residency.take_in([model])

    assert [model["name"] for model in state.snapshot()["models"]] == ["Sequential"]
