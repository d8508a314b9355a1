"""bitsandbytes: tables it shares among models, weights it has not quantized yet, weights it would repack on a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from ..holdings import Inventory
from .base import Kind

NOT_QUANTIZED = (
    "bitsandbytes has not quantized it yet and does so in its own .to(): call model.to(device) once, as without qmove "
    "(after qmove.disable_to(model) if it is enabled); from then on qmove moves it"
)
PACKED = (
    "a forward on this CPU has packed it for AVX512-BF16 and rounded its scales to bfloat16 for good; a GPU would read "
    "it wrongly. Load the model again. What qmove.move(model, 'cpu') brings to the CPU is never packed"
)


class BitsAndBytes(Kind):
    """`Linear8bitLt`, `Linear4bit` and the embeddings. Their tensors move as they are; the first line has the rest."""

    module = "bitsandbytes"

    def __init__(self) -> None:
        self._originals = WeakTensorKeyDictionary()  # twin -> the shared table it stands in for
        # module -> the flag it had (an int of the C library, as a rule); outlasts the way back, which may fail
        self._kept_from_packing: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def process_wide_tensors(self) -> Iterable[torch.Tensor]:
        functional = sys.modules.get("bitsandbytes.functional")
        backends = sys.modules.get("bitsandbytes.backends.utils")
        yield from getattr(functional, "name2qmap", {}).values()
        yield from getattr(backends, "_code_4bit_cache", {}).values()  # since 0.50

    def obstacles(self, inventory: Inventory, device: torch.device) -> list[tuple[str, str]]:
        from bitsandbytes.nn import Int8Params, Params4bit

        if device.type == "cpu":
            return []
        found = []
        for holding in inventory.holdings:
            for tensor in holding.tensors:
                if isinstance(tensor, (Int8Params, Params4bit)) and awaits_quantization(tensor):
                    found.append((holding.name, NOT_QUANTIZED))
                elif isinstance(tensor, Params4bit) and is_packed_for_cpu(tensor):
                    found.append((holding.name, PACKED))
        return found

    def refresh(self, inventory: Inventory) -> None:
        self._refresh_tables(inventory)
        was_on = {
            id(tensor): holding.device
            for holding in inventory.holdings
            for tensor in holding.tensors
        }
        for module in inventory.modules.values():
            if "support_avx512bf16_for_cpu" in module.__dict__ and id(module.weight) in was_on:
                self._choose_packing(module, was_on[id(module.weight)])

    def _refresh_tables(self, inventory: Inventory) -> None:
        """Gives each quant state that uses a shared table one that lies where its weight is.

        The table is bitsandbytes' own, used by all models, and must not move with one of them.
        """
        shared = {id(table) for table in self.process_wide_tensors()}
        twins: dict[tuple[int, torch.device], torch.Tensor] = {}
        for state, device in _quant_states(inventory):
            if state.code is not None and (
                id(state.code) in shared or state.code in self._originals
            ):
                state.code = self._table_on(device, state.code, twins)

    def _table_on(
        self,
        device: torch.device,
        code: torch.Tensor,
        twins: dict[tuple[int, torch.device], torch.Tensor],
    ) -> torch.Tensor:
        """The original where that is at hand, else a copy of it on `device`."""
        original = self._originals.get(code, code)
        if original.device == device:
            return original
        if code.device == device:
            return code
        key = (id(original), device)
        if key not in twins:
            twins[key] = original.to(device)
            self._originals[twins[key]] = original
        return twins[key]

    def _choose_packing(self, module: nn.Module, was_on: torch.device) -> None:
        """Keeps `Linear4bit` from packing a weight that came from a GPU in a forward on the CPU.

        The packing rounds `absmax` to bf16 and is not undone on the way to a GPU (bitsandbytes #2078): the weights
        would be wrong for good.
        """
        weight: Any = module.weight
        state: Any = module
        if weight.device.type != "cpu":
            if module in self._kept_from_packing:
                state.support_avx512bf16_for_cpu = self._kept_from_packing[module]
        elif state.support_avx512bf16_for_cpu and (
            was_on.type != "cpu" or module in self._kept_from_packing
        ):
            self._kept_from_packing[module] = state.support_avx512bf16_for_cpu
            state.support_avx512bf16_for_cpu = False


def awaits_quantization(weight: Any) -> bool:
    """Whether an `Int8Params` or `Params4bit` still has the plain weights that it is to be quantized from."""
    if hasattr(weight, "bnb_quantized"):
        return not weight.bnb_quantized and weight.quant_state is None
    return weight.is_floating_point() and not weight.has_fp16_weights


def is_packed_for_cpu(weight: Any) -> bool:
    """Whether bitsandbytes (since 0.49) has brought a `Params4bit` into the layout of its AVX512-BF16 kernels."""
    return bool(getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False))


def _quant_states(inventory: Inventory) -> Iterator[tuple[Any, torch.device]]:
    """Every 4-bit quant state of the model, nested ones too, with the device of its weight."""
    from bitsandbytes.nn import Params4bit

    for holding in inventory.holdings:
        for tensor in holding.tensors:
            if isinstance(tensor, Params4bit):
                yield from _with_nested(tensor.quant_state, tensor.device)
    for module in inventory.modules.values():  # FSDP leaves the state on the module alone
        if "quant_state" not in module.__dict__:
            continue
        weight = module._parameters.get("weight")
        if weight is not None:
            yield from _with_nested(module.__dict__["quant_state"], weight.device)


def _with_nested(state: Any, device: torch.device) -> Iterator[tuple[Any, torch.device]]:
    while hasattr(state, "absmax"):
        yield state, device
        state = getattr(state, "state2", None)
