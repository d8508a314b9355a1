"""For authors of ComfyUI packs: a loader and a node that uses its model, with and without qmove.

Copy this folder into `custom_nodes`. With the qmove pack beside it nothing of the lines marked (1)
is needed: it finds the model, parks it when others need the VRAM, and brings it home before a node
of yours runs. They are for users who have only the package (`pip install qmove`), or neither.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

try:
    import qmove_core as qmove  # (1) the same one that the pack uses
except ImportError:
    qmove = None  # type: ignore[assignment]


class LoadLanguageModel:
    """Loads a model. No `.to("cpu")` and no `del` are needed: parked, it is back in seconds."""

    CATEGORY, FUNCTION = "language", "load"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("LANGUAGE_MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"folder": ("STRING", {"default": ""})}}

    def load(self, folder: str) -> tuple[dict[str, Any]]:
        if qmove is None:
            model = AutoModelForCausalLM.from_pretrained(folder, device_map={"": "cuda:0"})
        else:  # (1) straight into RAM: VRAM is taken when the model is used
            model = qmove.from_pretrained(AutoModelForCausalLM, folder, parked=True)
        return ({"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder)},)


class WriteText:
    """Uses the model, on the device that it is home on: never on "cuda" by name."""

    CATEGORY, FUNCTION = "language", "write"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "language_model": ("LANGUAGE_MODEL",),
                "prompt": ("STRING", {"default": "Once upon a time"}),
                "park_after": ("BOOLEAN", {"default": False}),
            }
        }

    def write(self, language_model: dict[str, Any], prompt: str, park_after: bool) -> tuple[str]:
        model, tokenizer = language_model["model"], language_model["tokenizer"]
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        if park_after and qmove is not None:  # (1)
            qmove.park(model)
        return (tokenizer.decode(tokens[0], skip_special_tokens=True),)


NODE_CLASS_MAPPINGS = {"LoadLanguageModel": LoadLanguageModel, "WriteText": WriteText}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadLanguageModel": "Load Language Model",
    "WriteText": "Write Text",
}
