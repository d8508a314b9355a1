"""Runs PyTorch without whatever traces, transforms or fakes it around a use that wakes a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def plain_torch() -> Iterator[None]:
    """Outside of `torch.jit.trace`, functorch's transforms, dispatch modes, and inference mode."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with (
            torch._C._DisableFuncTorch(),
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            yield
    finally:
        torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
