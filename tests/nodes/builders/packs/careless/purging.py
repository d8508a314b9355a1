"""Nodes that free VRAM in ways that nobody else knows of."""

import gc

import comfy.model_management
import torch


class CarelessPurge:
    """Empties the storage of every tensor that the collector finds."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"after": ("STRING", {"forceInput": True})}}

    def run(self, after):
        for obj in gc.get_objects():
            try:
                if isinstance(obj, torch.Tensor) and obj.is_cuda:
                    obj.untyped_storage().resize_(0)
            except Exception:
                continue
        torch.cuda.empty_cache()
        return (after,)


class CarelessClear(CarelessPurge):
    """Empties ComfyUI's list of loaded models."""

    def run(self, after):
        comfy.model_management.current_loaded_models.clear()
        return (after,)


NODES = (CarelessPurge, CarelessClear)
