"""What the machine is. Nothing can fail here but the card itself."""

from __future__ import annotations

import torch

from ..checks import Checks
from ..machine import Sizes, facts


def run(checks: Checks, sizes: Sizes) -> None:
    for name, value in facts().items():
        checks.figure(name, value)
    for name, count in sizes.to_dict().items():
        checks.figure(f"size of the steps: {name}", count)
    with checks.no_error("the card computes", "card"):
        ones = torch.ones(16, device="cuda:0")
        checks.expect("the card computes rightly", float(ones.sum()) == 16.0, "", "card")
