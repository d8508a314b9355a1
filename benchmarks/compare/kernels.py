"""On the simulated GPU: the kernels of the linear layers as time on the virtual clock.

There a layer runs on the CPU, where dequantizing a model's int8 or nf4 weights takes seconds to
minutes that say nothing about a GPU. All the Python of a layer runs as it is, only the kernel at
its end is replaced; on a real GPU nothing is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def virtual_kernels(seconds: float) -> Iterator[None]:
    """Inside, a linear layer takes `seconds` of the virtual clock on the current stream, and
    returns its input.

    As on a GPU it is an error if its weights are not where its input is.
    """
    from simcuda import clock

    def run(x: torch.Tensor, *operands: torch.Tensor | None) -> torch.Tensor:
        elsewhere = {
            operand.device
            for operand in operands
            if operand is not None and operand.device != x.device
        }
        if elsewhere:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found {x.device} and {elsewhere}"
            )
        clock.compute(seconds)
        return x

    def linear(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return run(x, weight, bias)

    def matmul(
        x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None, state: Any
    ) -> torch.Tensor:
        return run(x, state.CB if state.CB is not None else weight, state.SCB, bias)

    def matmul_4bit(
        x: torch.Tensor, weight: torch.Tensor, *, bias: torch.Tensor | None, quant_state: Any
    ) -> torch.Tensor:
        return run(x, weight, quant_state.absmax, bias)

    with ExitStack() as patched:
        patched.enter_context(mock.patch("torch.nn.functional.linear", linear))
        if "bitsandbytes" in sys.modules:
            patched.enter_context(mock.patch("bitsandbytes.matmul", matmul))
            patched.enter_context(mock.patch("bitsandbytes.matmul_4bit", matmul_4bit))
        yield
