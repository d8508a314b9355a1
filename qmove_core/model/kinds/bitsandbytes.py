"""bitsandbytes: tables that models share, weights not yet quantized, weights packed for a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

from ... import devices
from ...storages import rebind
from ..holdings import Inventory
from .base import Kind
from .bitsandbytes_layout import awaits_quantization, is_of, is_packed_for_cpu, with_nested

NOT_QUANTIZED = (
    "bitsandbytes has not quantized it yet and does so in its own .to(): call model.to(device) "
    "once, as without qmove (after qmove.disable_to(model) if it is enabled); from then on qmove "
    "moves it"
)
PACKED = (
    "a forward on this CPU has packed it for AVX512-BF16 and rounded its scales to bfloat16 for "
    "good; a GPU would read it wrongly. Load the model again. What qmove.move(model, 'cpu') brings "
    "to the CPU is never packed"
)
_FLAG = "support_avx512bf16_for_cpu"  # of a `Linear4bit`; an int of the C library, as a rule


class BitsAndBytes(Kind):
    """`Linear8bitLt`, `Linear4bit` and the embeddings. Their bytes move as they are."""

    module = "bitsandbytes"

    def __init__(self) -> None:
        self._originals = WeakTensorKeyDictionary()  # twin -> the shared table it stands in for
        self._twins: WeakIdKeyDictionary = WeakIdKeyDictionary()  # quant state -> its last twin
        # module -> (its flag, whether that is set aside); kept when it is back, since the way back
        # may fail
        self._flags: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def process_wide_tensors(self) -> Iterable[torch.Tensor]:
        functional = sys.modules.get("bitsandbytes.functional")
        backends = sys.modules.get("bitsandbytes.backends.utils")
        yield from getattr(functional, "name2qmap", {}).values()
        yield from getattr(backends, "_code_4bit_cache", {}).values()  # since 0.50

    def obstacles(self, inventory: Inventory, device: torch.device) -> list[tuple[str, str]]:
        if device.type == "cpu":
            return []
        found = []
        for holding in inventory.holdings:
            for tensor in holding.tensors:
                is_4bit = is_of(tensor, "Params4bit")
                if (is_4bit or is_of(tensor, "Int8Params")) and awaits_quantization(tensor):
                    found.append((holding.name, NOT_QUANTIZED))
                elif is_4bit and is_packed_for_cpu(tensor):
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
            if _FLAG in module.__dict__ and id(module.weight) in was_on:
                self._choose_packing(module, was_on[id(module.weight)])

    def _refresh_tables(self, inventory: Inventory) -> None:
        """Gives each quant state that uses a shared table one that lies where its weight is.

        The table is bitsandbytes' own, used by all models, and must not move with one of them. It
        is used where it is at hand; elsewhere a twin stands in for it, the same object each time.
        """
        shared = {id(table) for table in self.process_wide_tensors()}
        made: dict[tuple[int, torch.device], torch.Tensor] = {}
        for state, device in _quant_states(inventory):
            code = state.code
            if code is None or not (id(code) in shared or code in self._originals):
                continue
            original = self._originals.get(code, code)
            twin = self._twins.get(state) if code is original else code
            if original.device == device:
                state.code = original
                if twin is not None:
                    _bring(twin, original, devices.CPU)  # nothing of it stays on an accelerator
            elif twin is not None:
                state.code = twin
                _bring(twin, original, device)
            else:
                key = (id(original), device)
                if key not in made:
                    made[key] = original.to(device)
                    self._originals[made[key]] = original
                state.code = twin = made[key]
            if twin is not None:
                self._twins[state] = twin

    def _choose_packing(self, module: nn.Module, was_on: torch.device) -> None:
        """Keeps `Linear4bit` from packing a weight that came from a GPU in a forward on the CPU.

        The packing rounds `absmax` to bf16 and is not undone on the way to a GPU (bitsandbytes
        #2078): the weights would be wrong for good.
        """
        flag, (before, is_set_aside) = (
            module.__dict__[_FLAG],
            self._flags.get(module, (None, False)),
        )
        if module.weight.device.type != "cpu":
            if is_set_aside:
                before = before if flag is False else flag  # or else it was set meanwhile
                module.__dict__[_FLAG] = before
                self._flags[module] = (before, False)
        elif flag and (was_on.type != "cpu" or module in self._flags):
            self._flags[module] = (flag, True)
            module.__dict__[_FLAG] = False
        elif not is_set_aside:
            self._flags.pop(module, None)


def _bring(twin: torch.Tensor, original: torch.Tensor, device: torch.device) -> None:
    if twin.device != device:
        rebind([twin], original.to(device, copy=True).untyped_storage())


def _quant_states(inventory: Inventory) -> Iterator[tuple[Any, torch.device]]:
    """Every 4-bit quant state of the model, nested ones too, with the device of its weight."""
    for holding in inventory.holdings:
        for tensor in holding.tensors:
            if is_of(tensor, "Params4bit"):
                for state in with_nested(tensor.quant_state):  # type: ignore[attr-defined]
                    yield state, tensor.device
    for module in inventory.modules.values():  # FSDP leaves the state on the module alone
        if "quant_state" not in module.__dict__:
            continue
        weight = module._parameters.get("weight")
        if weight is not None:
            for state in with_nested(module.__dict__["quant_state"]):
                yield state, weight.device
