"""Quantizing on a device while everything else is loaded on the host: one weight after the other
goes there, and what it becomes leaves at once."""

from __future__ import annotations

from typing import Any

import torch

from ..parking import adopting


class QuantizesThere:
    """As an operation of transformers that quantizes a weight, on `device`."""

    def __init__(self, operation: Any, device: torch.device) -> None:
        self._operation, self._device = operation, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operation, name)

    def convert(self, input_dict: dict[str, Any], **options: Any) -> Any:
        """Gives what the operation gives, on the host."""
        there = {name: self._there(value) for name, value in input_dict.items()}
        result = self._operation.convert(there, **options)
        there.clear()  # the plain values go before anything is allocated
        layer = options["full_layer_name"].rpartition(".")[0]
        adopting.to_host([result, options["model"].get_submodule(layer)])
        return result

    def _there(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._there(item) for item in value]
        return value.to(self._device) if isinstance(value, torch.Tensor) else value


class QuantizesElsewhere(Exception):
    """A method of quantization that may need the device for more than one weight at a time."""


_ONE_BY_ONE = ("bitsandbytes", "quanto", "torchao")


def quantizing_there(quantizer: Any, device: torch.device) -> None:
    """Lets a quantizer of transformers quantize each weight on `device`.

    Raises:
        QuantizesElsewhere: the method is none of those that are known to work so.
    """
    method = quantizer.quantization_config.quant_method
    if getattr(method, "value", method) not in _ONE_BY_ONE:
        raise QuantizesElsewhere
    original = quantizer.get_quantize_ops
    quantizer.get_quantize_ops = lambda: QuantizesThere(original(), device)


def quantizing_as_before(quantizer: Any) -> None:
    """Undoes `quantizing_there`."""
    quantizer.__dict__.pop("get_quantize_ops", None)
