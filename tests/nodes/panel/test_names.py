"""A model is what its user calls it: its file or repository, what it says itself, its loader."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from qmove_pack.nodes.host.models import names, residency
from qmove_pack.nodes.host.models.adopted import adopted_models
from qmove_pack.nodes.host.panel import state
from torch import nn

from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher


class LoadAnything(careless_nodes._Node):
    """Takes whatever is written on it, and gives one model."""

    def run(self, **inputs: Any) -> tuple[Any]:
        return (careless_nodes.wrap(model_of(1), "plain"),)


class LoadThree(careless_nodes._Node):
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL", "CLIP", "VAE")

    def run(self, **inputs: Any) -> tuple[Any, ...]:
        return model_of(1), ModelPatcher(model_of(1)), [model_of(1)]


class PassOn(careless_nodes._Node):
    def run(self, model: Any, name: str) -> tuple[Any]:
        return (model,)


@pytest.fixture(autouse=True)
def _nodes(host: FakeHost) -> None:
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL, LoadAnything, LoadThree, PassOn)


def load(host: FakeHost, title: str | None = None, **inputs: Any) -> list[str]:
    """Runs a loader with these inputs; returns what its models are called."""
    meta = {"_meta": {"title": title}} if title is not None else {}
    host.run({"load": {"class_type": "LoadAnything", "inputs": inputs, **meta}})
    assert host.errors == []
    return [model["name"] for model in state.snapshot()["models"]]


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        ({"ckpt_name": "flux/flux1-dev.safetensors"}, "flux1-dev.safetensors"),
        ({"whatever": "C:\\models\\wan2.2.Q4_K_M.gguf"}, "wan2.2.Q4_K_M.gguf"),
        ({"clip_name1": "clip_l.sft", "clip_name2": "t5.sft"}, "clip_l.sft + t5.sft"),
        ({"repo_id": "Qwen/Qwen2.5-VL-7B-Instruct"}, "Qwen/Qwen2.5-VL-7B-Instruct"),
        (
            {"path": "/cache/models--microsoft--Florence-2-large/snapshots/abc"},
            "microsoft/Florence-2-large",
        ),
        ({"model": "large-v3", "device": "cuda:0"}, "large-v3"),
        ({"model_path": "/data/llm/joy-caption/", "seed": 3}, "joy-caption"),
        ({"device": "cuda", "dtype": "fp16", "name": "TextEncoder"}, "TextEncoder"),
    ],
)
def test_what_the_loader_names(host: FakeHost, inputs: dict[str, Any], name: str) -> None:
    assert load(host, "Load LLM", **inputs) == [name]


@pytest.mark.parametrize(
    "inputs",
    [
        {"device": "cuda:0", "precision": "fp16", "quantization": "nf4"},
        {"prompt": "a model of a house", "text": "models/house"},
        {"name": "two\nlines"},
        {"name": ""},
        {"name": "x" * 300},
        {"model": ["load", 0]} | {"seed": 1},
    ],
)
def test_where_it_names_nothing_the_title_of_the_loader(
    host: FakeHost, inputs: dict[str, Any]
) -> None:
    inputs = {key: value for key, value in inputs.items() if not isinstance(value, list)}
    assert load(host, "Load LLM", **inputs) == ["Load LLM"]


def test_three_of_one_loader_have_three_names(host: FakeHost) -> None:
    title = {"_meta": {"title": "Load Blob"}}
    host.run(
        {str(n): {"class_type": "LoadAnything", "inputs": {"seed": n}, **title} for n in range(3)}
    )
    found = [model["name"] for model in state.snapshot()["models"]]
    assert found == ["Load Blob", "Load Blob (2)", "Load Blob (3)"]
    assert {model["class"] for model in state.snapshot()["models"]} == {"Sequential"}


def test_the_parts_of_a_checkpoint_say_which_they_are(host: FakeHost) -> None:
    inputs = {"ckpt_name": "sdxl.safetensors"}
    host.run({"load": {"class_type": "LoadThree", "inputs": inputs}})
    outputs = host.cache.entries["load"]
    _model, clip, _vae = (values[0] for values in getattr(outputs, "outputs", outputs))
    host.management.load_models_gpu([clip])

    seen = state.snapshot()
    assert {model["name"] for model in seen["models"]} == {
        "sdxl.safetensors · MODEL",
        "sdxl.safetensors · VAE",
    }
    assert [own["name"] for own in seen["comfyui_models"]] == ["sdxl.safetensors · CLIP"]


def test_a_node_that_only_hands_it_on_does_not_rename_it(host: FakeHost) -> None:
    load_ = {"class_type": "LoadAnything", "inputs": {"name": "flux.gguf"}}
    pass_on = {"class_type": "PassOn", "inputs": {"model": ["load", 0], "name": "lora.gguf"}}
    host.run({"load": load_, "on": pass_on})
    assert [adopted.name for adopted in adopted_models()] == ["flux.gguf"]


@pytest.mark.parametrize("where", ["config", "_internal_dict", "name_or_path"])
def test_what_it_says_itself(host: FakeHost, where: str) -> None:
    model: nn.Module = model_of(1)
    told: Any = {"_name_or_path": "owner/model-7b"}
    if where == "config":
        told = SimpleNamespace(**told)
    setattr(model, where, "owner/model-7b" if where == "name_or_path" else told)
    (adopted,) = residency.take_in([model])
    assert adopted.name == "owner/model-7b"


def test_else_its_class() -> None:
    assert names.of(model_of(1)) == "Sequential"
