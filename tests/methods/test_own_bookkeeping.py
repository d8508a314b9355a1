"""Models that note their device themselves: an enabled `to()` moves them and lets them note it, once.

A table of classes and calls; each class notes where it was told to go, in its own way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import tiny_diffusion, tiny_llama

pytestmark = pytest.mark.simulated


class _Noting(nn.Module):
    """Two layers, and how often each method ran."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
        self.noted: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x.to(self.noted[-1] if self.noted else "cpu"))


class NotesFirst(_Noting):
    def to(self, device: Any, *args: Any, **kwargs: Any) -> Any:
        self.noted.append(str(torch.device(device)))
        return super().to(device, *args, **kwargs)

    def cuda(self, device: Any = 0) -> Any:
        return self.to(f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        return self.to("cpu")


class NotesAfterwards(_Noting):
    """In a configuration, when its parents have moved it."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg = SimpleNamespace(device="cpu")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)
        self.cfg.device = self.layers[0].weight.device
        self.noted.append(str(self.cfg.device))
        return self

    def cuda(self, device: Any = None) -> Any:
        super().cuda(device)
        self.noted.append(str(self.layers[0].weight.device))
        return self

    def cpu(self) -> Any:
        super().cpu()
        self.noted.append("cpu")
        return self


class MovesItself(_Noting):
    def to(self, device: Any) -> Any:
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device)
        self.noted.append(str(torch.device(device)))
        return self

    def cuda(self, device: Any = 0) -> Any:
        return MovesItself.to(self, f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        return MovesItself.to(self, "cpu")


class Mixin:
    def to(self, *args: Any, **kwargs: Any) -> Any:
        result = super().to(*args, **kwargs)  # type: ignore[misc]
        self.noted.append(str(torch._C._nn._parse_to(*args, **kwargs)[0]))  # type: ignore[attr-defined]
        return result

    def cuda(self, device: Any = 0) -> Any:
        return self.to(f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        return self.to("cpu")


class NotesInAMixin(Mixin, _Noting):
    """The class with the methods comes from elsewhere."""


class MovesItsLayers(_Noting):
    """Moves its layers one by one."""

    def to(self, device: Any) -> Any:
        for layer in self.layers:
            layer.to(device)
        self.noted.append(str(torch.device(device)))
        return self

    def cuda(self, device: Any = 0) -> Any:
        return self.to(f"cuda:{device}" if isinstance(device, int) else device)

    def cpu(self) -> Any:
        return self.to("cpu")


CLASSES: list[type[_Noting]] = [
    NotesFirst,
    NotesAfterwards,
    MovesItself,
    NotesInAMixin,
    MovesItsLayers,
]
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to": (lambda model: model.to("cuda:0"), "cuda:0"),
    "to a device": (lambda model: model.to(torch.device("cuda", 1)), "cuda:1"),
    "to(device=)": (lambda model: model.to(device="cuda:0"), "cuda:0"),
    "cuda": (lambda model: model.cuda(), "cuda:0"),
    "cuda(index)": (lambda model: model.cuda(1), "cuda:1"),
    "cpu": (lambda model: model.cpu(), "cpu"),
    "to the host": (lambda model: model.to("cpu"), "cpu"),
}


@pytest.mark.parametrize("was", ["resident", "parked", "arriving", "on the host"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("cls", CLASSES)
def test_its_own_method_notes_the_device_once(
    gpu: GPU, second_gpu: GPU, cls: type[_Noting], call: tuple[Callable[[Any], Any], str], was: str
) -> None:
    move, place = call
    twin, model = cls(), qmove.enable_to(cls())
    for each in (twin, model):
        if was != "on the host":
            nn.Module.cuda(each)
            each.noted.append("cuda:0")
    expected = twin(torch.ones(2, 8))
    if was in ("parked", "arriving"):
        qmove.park(model)
    if was == "arriving":
        qmove.restore(model, stream=True)
    before = {id(module): type(module) for module in model.layers.modules()}
    noted = len(model.noted)

    assert move(model) is model

    streaming.wait_for()
    assert model.noted[noted:] == [place]
    assert {str(p.device) for p in model.parameters()} == {place}
    assert torch.equal(model(torch.ones(2, 8)).cpu(), expected.cpu())
    assert not qmove.is_parked(model) and qmove.restore(model).nbytes == 0
    if was in ("resident", "on the host"):
        assert {id(module): type(module) for module in model.layers.modules()} == before


@pytest.mark.parametrize("cls", [NotesFirst, NotesAfterwards, NotesInAMixin])
def test_a_cast_with_a_move_is_noted_once(gpu: GPU, cls: type[_Noting]) -> None:
    model = qmove.enable_to(cls())
    model.to("cuda:0", torch.float16)
    assert model.noted == ["cuda:0"]
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cuda", torch.float16)}


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_below_its_own_method_the_library_forbids_the_move(
    gpu: GPU, tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The class of the model forbids it, and one of a wrapper around it is called on the way."""
    inner = tiny_llama(precision, tmp_path)
    forbidden = {
        name: lambda self, *args, **kwargs: (_ for _ in ()).throw(ValueError("not supported"))
        for name in ("to", "cuda", "cpu")
    }
    library = type("Guarded", (type(inner),), forbidden | {"__module__": "transformers.models"})

    class Own(library):  # type: ignore[misc, valid-type]
        def to(self, device: Any) -> Any:
            super().to(device)
            self.where = device
            return self

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def to(self, device: Any) -> Any:
            self.model.to(device)
            self.device = torch.device(device)
            return self

    inner.__class__ = Own
    with pytest.raises(ValueError, match="not supported"):
        inner.to("cpu")
    wrapper = qmove.enable_to(Wrapper())
    parameters = {name: id(parameter) for name, parameter in wrapper.named_parameters()}

    wrapper.to("cpu")

    assert (wrapper.device, inner.where) == (torch.device("cpu"), "cpu")
    assert qmove.inventory(wrapper).by_device.keys() == {"cpu"}
    qmove.enable_to(inner).to("cuda:0")
    assert inner.where == "cuda:0"
    assert type(inner).__name__ == "Own" and inner.__class__ is Own
    assert {name: id(p) for name, p in wrapper.named_parameters()} == parameters


def test_what_its_own_method_raises_is_told_and_the_model_has_moved(
    gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(_Noting):
        def to(self, device: Any) -> Any:
            raise ValueError("8-bit models cannot be moved")

    model = qmove.enable_to(Refusing())
    with caplog.at_level(logging.WARNING, logger="qmove"):
        assert model.to("cuda:0") is model
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert "8-bit models cannot be moved" in caplog.text
    assert type(model.layers[0]) is nn.Linear


def test_the_models_of_a_pipeline_note_it_too(gpu: GPU) -> None:
    pipe = tiny_diffusion()

    class Own(type(pipe.unet)):  # type: ignore[misc]
        def to(self, *args: Any, **kwargs: Any) -> Any:
            self.noted = [*getattr(self, "noted", []), args]
            return super().to(*args, **kwargs)

    pipe.unet.__class__ = Own
    qmove.enable_to(pipe).to("cpu")
    assert pipe.unet.noted == [("cpu",)]
    assert pipe.device.type == "cpu"


def test_a_model_without_a_method_of_its_own_is_left_alone(gpu: GPU) -> None:
    model = qmove.enable_to(_Noting())
    types = [type(module) for module in model.modules()]
    model.to("cuda")
    assert [type(module) for module in model.modules()] == types
