"""What all tests of requantizing need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """No graphs; and bitsandbytes' own tables exist already, so that no test counts them as its
    model's bytes."""
    for quant_type in ("nf4", "fp4"):
        dequantize_4bit(*quantize_4bit(torch.ones(64, 64, device="cuda"), quant_type=quant_type))
    with torch.no_grad():
        yield
