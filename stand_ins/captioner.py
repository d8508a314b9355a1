"""A captioner that keeps its model on the node's instance."""

from __future__ import annotations

from typing import Any

import torch

from .models import CATEGORY, SHARE, Captioner, load


class StandInCaptioner:
    """Says what a picture shows. Stands for a captioner of another pack."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    FUNCTION = "caption"
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("caption",)
    DEV_ONLY = True  # no search offers it, where the frontend knows that

    def __init__(self) -> None:
        self._model: Captioner | None = None

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "share_of_vram": ("FLOAT", SHARE)}}

    def caption(self, image: torch.Tensor, share_of_vram: float) -> tuple[str]:
        """`image`: float32, shape (batch, height, width, 3), from 0 to 1."""
        if self._model is None:
            self._model = load(Captioner, share_of_vram)
        self._model.check()
        red, green, blue = (float(image[..., channel].mean()) for channel in range(3))
        size = f"{image.shape[2]} x {image.shape[1]} pixels"
        return (f"A picture of {size}: red {red:.2f}, green {green:.2f}, blue {blue:.2f}.",)
