"""Odd values, and what tells whether an object has the very attributes again that it had."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import numpy
import pytest
import torch
from torch import nn


class Text(str):
    pass


class Map(dict):  # type: ignore[type-arg]
    pass


ABSENT: Any = type("ABSENT", (), {"__repr__": lambda self: "absent"})()
FLAGS = [1, True, numpy.bool_(True), 0, False, numpy.bool_(False), None, ABSENT]
ODD = [*FLAGS, Text("x"), Text(""), Map(a=1), Map(), numpy.float64(0.0)]
odd_flags = pytest.mark.parametrize("value", FLAGS, ids=lambda v: f"{type(v).__name__} {v!r}")
odd_values = pytest.mark.parametrize("value", ODD, ids=lambda v: f"{type(v).__name__} {v!r}")


def put(obj: Any, name: str, value: Any) -> None:
    """Gives an attribute its odd value, or none, at the place in the `__dict__` where it stands."""
    if value is ABSENT:
        obj.__dict__.pop(name, None)
    else:
        obj.__dict__[name] = value


class Objects:
    """Everything in the `__dict__`s of a model's modules, parameters, quant states and hook
    registries."""

    def __init__(self, model: Any) -> None:
        self.found = {
            name: (obj, type(obj), list(obj.__dict__.items())) for name, obj in _parts(model)
        }

    def assert_same(self) -> None:
        for name, (obj, cls, attributes) in self.found.items():
            assert type(obj) is cls, name
            now = obj.__dict__
            assert list(now) == [key for key, _value in attributes], name
            changed = [key for key, value in attributes if now[key] is not value]
            assert not changed, f"{name}: {changed}"


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        yield "pipeline", model
        return
    for name, module in model.named_modules():
        yield name, module
        for slot, parameter in [*module._parameters.items(), *module._buffers.items()]:
            if parameter is not None:
                yield f"{name}.{slot}", parameter
                state, depth = getattr(parameter, "quant_state", None), 0
                while state is not None:
                    yield f"{name}.{slot}.quant_state{depth}", state
                    state, depth = state.state2, depth + 1
        if "state" in module.__dict__:
            yield f"{name}.state", module.state
        if "_diffusers_hook" in module.__dict__:
            registry = module._diffusers_hook
            yield f"{name}._diffusers_hook", registry
            yield from ((f"{name} {key}", hook) for key, hook in registry.hooks.items())
            yield from ((f"{name} fn {i}", fn) for i, fn in enumerate(registry._fn_refs))


def linear_4bit(device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float16, quant_type="nf4")
    return layer.half().eval().to(device)


def linear_8bit() -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0)
    return layer.half().eval().cuda()
