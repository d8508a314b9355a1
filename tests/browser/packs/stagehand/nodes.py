"""Nodes that load a model, use it, and forget it."""

from __future__ import annotations

import gc
from typing import Any, ClassVar

import torch

from .models import KINDS, build


class _Node:
    CATEGORY = "stagehand"
    FUNCTION = "run"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STAGEHAND_MODEL",)
    INPUTS: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.INPUTS, "optional": {"after": ("*", {})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types: Any) -> bool:
        return True


class StagehandLoad(_Node):
    """Puts a model on a GPU and gives it to the next node."""

    INPUTS: ClassVar[dict[str, Any]] = {
        "name": ("STRING", {"default": "DiffusionTransformer"}),
        "kind": (list(KINDS), {}),
        "mib": ("INT", {"default": 64, "max": 1 << 16}),
        "device": ("STRING", {"default": "cuda:0"}),
    }

    def run(
        self, name: str, kind: str, mib: int, device: str = "cuda:0", after: Any = None
    ) -> tuple[Any]:
        return (build(name, kind, mib, device),)


class StagehandUse(_Node):
    """Runs a model; its answer says what came out and where its first weight was meanwhile."""

    INPUTS: ClassVar[dict[str, Any]] = {"model": ("*", {}), "seed": ("INT", {"default": 0})}
    OUTPUT_NODE = True
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STRING",)

    def run(self, model: Any, seed: int = 0, after: Any = None) -> dict[str, Any]:
        first = model[0]
        torch.manual_seed(seed)
        given = torch.randn(1, first.in_features, dtype=torch.float16).to(first.weight.device)
        text = f"{float(model(given).float().abs().sum()):.6e} on {first.weight.device}"
        return {"ui": {"text": [text]}, "result": (text,)}


class StagehandKeep(_Node):
    """Takes a model and does nothing with it."""

    INPUTS: ClassVar[dict[str, Any]] = {"model": ("*", {}), "seed": ("INT", {"default": 0})}
    OUTPUT_NODE = True
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STRING",)

    def run(self, model: Any, seed: int = 0, after: Any = None) -> dict[str, Any]:
        return {"ui": {"text": ["kept"]}, "result": ("kept",)}


class StagehandNothing(_Node):
    """A prompt of this node alone drops all that the prompts before it have loaded."""

    INPUTS: ClassVar[dict[str, Any]] = {"seed": ("INT", {"default": 0})}
    OUTPUT_NODE = True
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()

    def run(self, seed: int = 0, after: Any = None) -> dict[str, Any]:
        gc.collect()
        return {"ui": {"text": ["nothing"]}, "result": ()}


NODE_DISPLAY_NAME_MAPPINGS = {"StagehandLoad": "Load Model", "StagehandUse": "Use Model"}
NODE_CLASS_MAPPINGS = {
    cls.__name__: cls for cls in (StagehandLoad, StagehandUse, StagehandKeep, StagehandNothing)
}
