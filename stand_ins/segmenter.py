"""A segmenter that keeps its model in a cache of its module."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .models import CATEGORY, SHARE, Segmenter, load


@functools.lru_cache(maxsize=1)
def _model(share: float) -> Segmenter:
    return load(Segmenter, share)


class StandInSegmenter:
    """Marks what is bright in a picture. Stands for a segmenter of another pack."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    FUNCTION = "segment"
    RETURN_TYPES = ("MASK",)
    DEV_ONLY = True  # no search offers it, where the frontend knows that

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",), "share_of_vram": ("FLOAT", SHARE)}}

    def segment(self, image: torch.Tensor, share_of_vram: float) -> tuple[torch.Tensor]:
        """`image`: float32, shape (batch, height, width, 3), from 0 to 1. The mask has no
        channels."""
        _model(share_of_vram).check()
        return ((image.mean(dim=-1) > 0.25).float(),)
