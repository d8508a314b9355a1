"""Node classes of a pack that knows nothing of ComfyUI's memory, for the fake host, and prompts
made of them."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import torch
from torch import nn

from tests.builders.models import layers

from .fake_host import FakeHost

MIB = 1 << 20

seen: list[tuple[str, Any]] = []  # what nodes noted while they ran: (node's label, what it saw)


def model_of(mib: int, device: str = "cuda:0") -> nn.Sequential:
    """Four layers of `mib` MiB in all."""
    return layers(4, width=int((mib * MIB / 16) ** 0.5), device=device)


class _Node:
    FUNCTION = "run"
    INPUTS: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.INPUTS}


class Load(_Node):
    """Puts a model straight onto the GPU; `shape` says how it is wrapped."""

    INPUTS: ClassVar[dict[str, Any]] = {
        "mib": ("INT", {}),
        "shape": (["plain", "list", "dict", "pipeline"], {}),
        "device": (["cuda:0", "cuda:1"], {}),
    }

    def run(
        self, mib: int, shape: str = "plain", after: Any = None, device: str = "cuda:0"
    ) -> tuple[Any]:
        model = model_of(mib, device)
        seen.append(("load", mib))
        return (wrap(model, shape),)


class Pipeline:
    """What packs hand around: an object with the module somewhere inside."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = {"net": model}


def wrap(model: nn.Module, shape: str) -> Any:
    return {
        "plain": model,
        "list": [model],
        "dict": {"model": model, "steps": 3},
        "pipeline": Pipeline(model),
    }[shape]


def unwrap(value: Any) -> nn.Sequential:
    if isinstance(value, list):
        return value[0]
    if isinstance(value, dict):
        return value["model"]
    return value.parts["net"] if isinstance(value, Pipeline) else value


class Use(_Node):
    """Runs a model, and notes which device its weights were on before it did, and what was
    allocated."""

    INPUTS: ClassVar[dict[str, Any]] = {"model": ("*", {}), "seed": ("INT", {}), "after": ("*", {})}

    def run(self, model: Any, seed: int = 0, after: Any = None) -> tuple[Any]:
        net = unwrap(model)
        seen.append((f"use {seed}", (str(net[0].weight.device), torch.cuda.memory_allocated())))
        with torch.no_grad():
            return (
                net(
                    torch.full(
                        (1, net[0].in_features), float(seed + 1), device=net[0].weight.device
                    )
                )
                .sum()
                .item(),
            )


class Scratch(_Node):
    """Needs much room for a moment, and no model."""

    INPUTS: ClassVar[dict[str, Any]] = {
        "mib": ("INT", {}),
        "seed": ("INT", {}),
        "after": ("*", {}),
        "file": ("STRING", {}),
    }

    def run(self, mib: int, seed: int = 0, after: Any = None, file: str = "") -> tuple[Any]:
        seen.append((f"scratch {seed}", torch.cuda.memory_allocated()))
        torch.empty(mib * MIB, dtype=torch.uint8, device="cuda:0")
        return (seed,)


class Text(_Node):
    """Gives out a text, and uses nothing."""

    INPUTS: ClassVar[dict[str, Any]] = {"text": ("STRING", {"multiline": True})}

    def run(self, text: str) -> tuple[Any]:
        return (len(text),)


class Loop(_Node):
    """Runs two models in turn: each round is nodes of its own, made while the prompt runs."""

    INPUTS: ClassVar[dict[str, Any]] = {
        "first": ("*", {}),
        "second": ("*", {}),
        "rounds": ("INT", {}),
        "seed": ("INT", {}),
    }

    def run(
        self, first: Any, second: Any, rounds: int, seed: int = 0, after: Any = None
    ) -> dict[str, Any]:
        graph: dict[str, Any] = {}
        for name, model in (("a", first), ("b", second)):
            graph[name] = node("Use", model=model, seed=seed)
        graph["b"]["inputs"]["after"] = ["a", 0]
        last = "b"
        if rounds > 1:
            last = "next"
            graph[last] = node("Loop", first=first, second=second, rounds=rounds - 1, seed=seed + 1)
            graph[last]["inputs"]["after"] = ["b", 0]
        return {"result": [[last, 0]], "expand": graph}


class Fail(_Node):
    INPUTS: ClassVar[dict[str, Any]] = {"model": ("*", {}), "after": ("*", {})}

    def run(self, model: Any, after: Any = None) -> tuple[Any]:
        raise ValueError("the node fails on purpose")


class Both(_Node):
    """Uses two models at once."""

    INPUTS: ClassVar[dict[str, Any]] = {"first": ("*", {}), "second": ("*", {})}

    def run(self, first: Any, second: Any) -> tuple[Any]:
        devices = [str(unwrap(model)[0].weight.device) for model in (first, second)]
        seen.append(("both", devices))
        return (1,)


ALL = (Load, Use, Scratch, Text, Loop, Fail, Both)


def node(name: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt; an input ("id", 0) is a link."""
    return {
        "class_type": name,
        "inputs": {k: list(v) if isinstance(v, tuple) else v for k, v in inputs.items()},
    }


def stages(count: int, mib: int, seed: int = 0) -> dict[str, Any]:
    """`count` stages one after the other; each loads a model of its own and uses it."""
    prompt: dict[str, Any] = {}
    for stage in range(1, count + 1):
        after = {"after": (f"use{stage - 1}", 0)} if stage > 1 else {}
        prompt[f"load{stage}"] = node("Load", mib=mib + stage, shape="plain", **after)
        prompt[f"use{stage}"] = node("Use", model=(f"load{stage}", 0), seed=seed + stage, **after)
    return prompt


def forget_all() -> None:
    """For the next test: what was noted, and models that the classes of the last test still hold
    (classes are cycles)."""
    seen.clear()
    gc.collect()


def noted(label: str) -> list[Any]:
    return [what for name, what in seen if name == label]


def model_in(host: FakeHost, node_id: str) -> Any:
    """The model that a node's output in the host's cache holds."""
    entry = host.cache.entries[node_id]
    return unwrap(getattr(entry, "outputs", entry)[0][0])
