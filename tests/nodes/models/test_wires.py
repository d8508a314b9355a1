"""The search for models in what flows on a wire: it goes through every kind of object that a pack
may use."""

from __future__ import annotations

import functools
import gc
import weakref
from typing import Any

import pytest
from qmove_pack.nodes.host.models import wires
from torch import nn


class Private:
    __slots__ = ("__model",)

    def __init__(self, model: nn.Module) -> None:
        self.__model = model


class Plain:
    __slots__ = ("model",)

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self) -> None:
        pass


def closure_of(model: nn.Module) -> Any:
    return lambda: model


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: [{"deep": (model,)}],
        Plain,
        Private,
        lambda model: Plain(model).run,
        lambda model: functools.partial(print, model=model),
        closure_of,
    ],
    ids=["containers", "slot", "private slot", "method", "partial", "closure"],
)
def test_a_model_is_found_inside(wrap: Any) -> None:
    model = nn.Linear(2, 2)

    assert wires.find_models([wrap(model)]).modules == [model]


def test_a_search_keeps_no_class_alive() -> None:
    """A pack may make a class for each model that it loads."""
    cls = type("Loaded", (Plain,), {})
    wires.find_models([cls(nn.Linear(2, 2))])
    reference = weakref.ref(cls)

    del cls
    gc.collect()

    assert reference() is None
