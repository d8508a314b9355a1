"""An object with a variant of its class behaves differently, and afterwards is what it was."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Sized
from typing import Any

import pytest
import torch
from torch import nn

from qmove_core.class_variants import (
    Variants,
    base_of,
    own_class,
    reduce_as_own_class,
    set_class,
)


def louder() -> Variants:
    return Variants(lambda cls: {"loud": lambda self: f"{cls.__name__}!"})


class Plain:
    """Plain's docstring."""


class Told(nn.Module):
    """Registers its subclasses, as libraries do."""

    subclasses: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls) -> None:
        Told.subclasses.append(cls.__name__)


class BehindAMixin(Sized, nn.Module):
    """Its first base is no module, so a module before it would change the memory layout."""

    def __len__(self) -> int:
        return 1


OBJECTS = [
    Plain(),
    nn.Linear(2, 2),
    Told(),
    BehindAMixin(),
    torch.ones(2),
    nn.Parameter(torch.ones(2)),
]


@pytest.mark.parametrize("obj", OBJECTS, ids=lambda obj: type(obj).__name__)
def test_an_object_has_a_variant_for_a_while_and_then_its_own_class(obj: Any) -> None:
    cls, variants, named = type(obj), louder(), dict(getattr(obj, "__dict__", {}))

    variants.give(obj)
    given = type(obj)
    variants.give(obj)

    assert type(obj) is given is variants.of(cls) and variants.made(given)
    assert isinstance(obj, cls) and base_of(given) is cls is own_class(obj)
    assert obj.loud() == f"{cls.__name__}!"
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(given, name) == getattr(cls, name)
    variants.take(obj)
    variants.take(obj)
    assert type(obj) is cls and not hasattr(obj, "loud")
    assert dict(getattr(obj, "__dict__", {})) == named


@pytest.mark.parametrize(
    "obj", [Plain(), Told(), torch.ones(2)], ids=lambda obj: type(obj).__name__
)
def test_variants_for_two_purposes_lie_one_on_the_other(obj: Any) -> None:
    cls, inner, outer = type(obj), louder(), Variants(lambda cls: {"soft": True})

    inner.give(obj)
    outer.give(obj)

    assert obj.soft and obj.loud() == f"{cls.__name__}!"
    assert own_class(obj) is cls and inner.made(base_of(type(obj)))
    inner.take(obj)  # it lies under the other one
    assert outer.made(type(obj))
    outer.take(obj)
    inner.take(obj)
    assert type(obj) is cls


def test_a_class_does_not_learn_of_its_variant() -> None:
    Told.subclasses.clear()

    Variants(lambda cls: {"soft": True}).of(louder().of(Told))
    assert Told.subclasses == []
    louder().of(Told, announced=True)

    assert Told.subclasses == ["Told"]


def test_a_class_with_a_setter_of_its_own_is_passed() -> None:
    class Stubborn:
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    obj, variants = Stubborn(), louder()

    variants.give(obj)

    assert variants.made(type(obj))


def test_a_class_that_cannot_be_exchanged_is_a_type_error_and_nothing_changes() -> None:
    variants, module = louder(), nn.Linear(2, 2)

    with pytest.raises(TypeError):
        variants.give(7)
    with pytest.raises(TypeError):
        set_class(module, dict)

    assert type(module) is nn.Linear


def test_a_variant_goes_with_its_class() -> None:
    variants = louder()

    def use_a_class_of_its_own() -> weakref.ref[type]:
        class Own(nn.Module):
            pass

        variants.give(Own())
        return weakref.ref(Own)

    own = use_a_class_of_its_own()
    gc.collect()  # the variant,
    gc.collect()  # and then the class, which was its key

    assert own() is None


def test_a_pickle_is_made_as_of_the_own_class() -> None:
    variants = Variants(
        lambda cls: {
            "__class__": property(own_class),
            "__reduce_ex__": lambda self, protocol: reduce_as_own_class(self, cls, protocol),
        }
    )
    obj = Plain()
    obj.value = 3

    variants.give(obj)
    copy = pickle.loads(pickle.dumps(obj))

    assert type(copy) is Plain and vars(copy) == {"value": 3}
    assert obj.__class__ is Plain and variants.made(type(obj))
